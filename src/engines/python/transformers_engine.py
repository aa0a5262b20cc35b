import gc


def make():
    try:
        import torch
        import transformers
    except ImportError as error:
        name = error.name or "transformers"
        raise missing(name, name) from error
    return Transformers(torch, transformers, compiled=sys.argv[-1] == "transformers-compile")


def version_of(package):
    import importlib.metadata
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


class Transformers:
    """transformers' generate with a streamer, as users run it; int8 and nf4 by bitsandbytes."""

    capabilities = ["logits", "score", "memory", "encode_tokens", "encode_picture"]

    def __init__(self, torch, transformers, compiled):
        self.torch, self.transformers, self.compiled = torch, transformers, compiled
        self.name = "transformers-compile" if compiled else "transformers"
        self.version = f"{transformers.__version__} (torch {torch.__version__}, bitsandbytes {version_of('bitsandbytes')})"
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.pixels = {}

    def load(self, request):
        torch, transformers = self.torch, self.transformers
        self.device, precision = torch.device(request["device"]), request["precision"]
        self.cuda = self.device.type == "cuda"
        torch.manual_seed(request.get("seed", 0))
        if self.cuda:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
            torch.zeros(1, device=self.device)
        else:
            torch.set_num_threads(request["threads"])
        config = transformers.AutoConfig.from_pretrained(request["model"])
        self.kind = "vision" if config.model_type == "paligemma" else "encoder" if config.is_encoder_decoder else "causal"
        self.image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        kind = {"vision": transformers.AutoModelForImageTextToText, "encoder": transformers.AutoModelForSeq2SeqLM,
                "causal": transformers.AutoModelForCausalLM}[self.kind]
        options = self.options(precision)
        start = now_ns()
        self.model = kind.from_pretrained(request["model"], device_map={"": request["device"]}, **options).eval()
        if self.cuda:
            torch.cuda.synchronize()
        load_s = (now_ns() - start) / 1e9
        # The end of the text is a token like any other: exactly as many are generated as asked.
        settings = self.model.generation_config
        settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
        self.capacity = request["capacity"]
        self.dtype = options["dtype"]
        self.steps = None
        self.watch_steps()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        self.high = {}
        return dict(load_s=load_s, kernels=torch.backends.cpu.get_cpu_capability() if not self.cuda else torch.cuda.get_device_name(),
                    held=self.held(precision, request))

    def options(self, precision):
        """What from_pretrained is asked for. Products of quantized layers are in fp32 on a CPU, where bitsandbytes is made for it."""
        torch = self.torch
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
        if precision in dtypes:
            return dict(dtype=dtypes[precision])
        try:
            import bitsandbytes
        except ImportError as error:
            raise missing("bitsandbytes", "bitsandbytes") from error
        dtype = torch.float16 if self.cuda else torch.float32
        if precision == "int8":
            settings = dict(load_in_8bit=True)
        elif precision in ("nf4", "nf4-nodq"):
            settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                            bnb_4bit_use_double_quant=precision == "nf4")
        else:
            raise Failure("error", f"transformers' adapter has no `{precision}`")
        return dict(dtype=dtype, quantization_config=self.transformers.BitsAndBytesConfig(**settings))

    def watch_steps(self):
        """Sums the time inside the model's forward, so that the host's time between steps is known. On a GPU a forward returns early."""
        if self.cuda or self.compiled:
            return
        forward = self.model.forward

        def timed(*args, **kwargs):
            start = now_ns()
            result = forward(*args, **kwargs)
            self.inside += now_ns() - start
            return result

        # generate looks at the signature.
        timed.__signature__ = __import__("inspect").signature(forward)
        self.model.forward, self.inside = timed, 0

    def held(self, precision, request):
        torch, model = self.torch, self.model
        names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "int8", torch.uint8: precision}
        by_format, sizes, wide, seen = {}, {}, [], set()
        for name, tensor in model.named_parameters():
            size, kind = tensor.numel() * tensor.element_size(), names.get(tensor.dtype, str(tensor.dtype))
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                parts = [state.absmax, getattr(state.state2, "absmax", None) if state.nested else None, state.offset if state.nested else None]
                size += sum(part.numel() * part.element_size() for part in parts if part is not None)
            scale = getattr(tensor, "SCB", None)
            if scale is not None:
                size += scale.numel() * scale.element_size()
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            by_format[kind] = by_format.get(kind, 0) + size
            sizes[name] = kind, size, tensor
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        of = lambda module: dict(format=names.get(module.weight.dtype, str(module.weight.dtype)),
                                 bytes=module.weight.numel() * module.weight.element_size())
        tied = head is not None and head.weight.data_ptr() == table.weight.data_ptr()
        read = sum(size for _, size, tensor in sizes.values())
        if not tied:
            read -= of(table)["bytes"] - of(table)["bytes"] // table.weight.shape[0]
        if self.kind != "causal":
            # A decode step reads no encoder, and has keys and values of the encoder's output in its cache.
            encoders = "encoder.", "vision_tower", "vision_model", "multi_modal_projector"
            cached = "EncDecAttention.k.", "EncDecAttention.v."
            is_read = lambda name: not any(part in name for part in encoders if "decoder" not in name) and not any(part in name for part in cached)
            read -= sum(size for name, (_, size, _) in sizes.items() if not is_read(name))
        if precision not in ("fp16", "bf16", "fp32"):
            wide = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
        text = model.config.get_text_config(decoder=True)
        layers = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // text.num_attention_heads
        element = torch.tensor([], dtype=self.dtype).element_size()
        per_position = 2 * layers * heads * width * element
        dtype = names[self.dtype]
        return dict(weights_by_format=by_format, weight_bytes_per_token=read, compute=dtype, logits=dtype,
                    head=of(head) if head is not None else None, embeddings=of(table),
                    kv_cache=dict(format=dtype, bytes=per_position * request["capacity"]), kv_bytes_per_position=per_position,
                    wide_modules=wide[:64])

    def inputs(self, run):
        """The arguments of generate, on the device."""
        torch, encode = self.torch, run.get("encode") or "nothing"
        ids = lambda tokens: torch.tensor([tokens], device=self.device)
        if run.get("depth"):
            raise Failure("error", "transformers' adapter runs behind no depth")
        if self.kind == "encoder":
            tokens = ids(encode["tokens"])
            return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), decoder_input_ids=ids(run["prompt"]))
        tokens = ids(run["prompt"])
        given = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        if isinstance(encode, dict) and "picture" in encode:
            given["pixel_values"] = self.picture(encode["picture"]["pixels"])
            given["token_type_ids"] = torch.zeros_like(tokens)
        return given

    def picture(self, path):
        if path not in self.pixels:
            from safetensors.torch import load_file
            self.pixels[path] = load_file(path)["pixels"][None].to(self.device, self.dtype)
        return self.pixels[path]

    def generate(self, run, **more):
        n = run["n_gen"]
        if self.compiled:
            more["cache_implementation"] = "static"
        with self.torch.inference_mode():
            return self.model.generate(**self.inputs(run), max_new_tokens=n, do_sample=False, num_beams=1,
                                       repetition_penalty=1.0, pad_token_id=0, **more)

    def run(self, request):
        if request["n_gen"] == 0:
            return {}
        streamer = Stamps(len(request["prompt"]), self)
        gc.collect()
        if self.cuda:
            self.torch.cuda.synchronize()
        self.inside, start = 0, now_ns()
        self.generate(request, streamer=streamer)
        stamps = streamer.stamps
        steps = zip(stamps, stamps[1:], streamer.inside, streamer.inside[1:])
        host = [] if self.cuda or self.compiled else [b - a - (y - x) for a, b, x, y in steps]
        return dict(start_ns=start, token_ns=stamps, ids=streamer.ids, host_step_ns=host)

    def logits(self, request):
        made = self.generate(request["run"], return_dict_in_generate=True, output_logits=True)
        rows = self.torch.cat([row[:1].float() for row in made.logits])
        write_rows(request["file"], rows.cpu().numpy())

    def score(self, request):
        torch = self.torch
        tokens, first, prefix = request["tokens"], request["first"], request.get("prefix") or []
        run = dict(prompt=prefix + tokens, encode=request.get("encode"), n_gen=1)
        with torch.inference_mode():
            logits = self.model(**self.inputs(run)).logits[0].float()
        begin = len(prefix) + first - 1
        write_rows(request["file"], logits[begin:begin + len(tokens) - first].cpu().numpy())

    def memory(self, request):
        if not self.cuda:
            return {}
        cuda, device = self.torch.cuda, self.device
        cuda.synchronize()
        report = dict(used_bytes=cuda.memory_allocated(device), used_high_bytes=cuda.max_memory_allocated(device),
                      reserved_bytes=cuda.memory_reserved(device), reserved_high_bytes=cuda.max_memory_reserved(device))
        cuda.reset_peak_memory_stats(device)
        return report

    def finish(self, request):
        return {}


class Stamps:
    """A streamer: generate hands it the prompt, then each token when it is on the host."""

    def __init__(self, n_prompt, engine):
        self.stamps, self.ids, self.inside, self.engine, self.prompt_comes = [], [], [], engine, True

    def put(self, tokens):
        if self.prompt_comes:
            self.prompt_comes = False
            return
        ids = tokens.tolist()
        self.stamps.append(now_ns())
        self.inside.append(getattr(self.engine, "inside", 0))
        self.ids.extend(ids)

    def end(self):
        pass


serve(make)
