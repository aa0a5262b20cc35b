import copy
import gc
import inspect


def make():
    try:
        import torch
        import transformers
    except ImportError as error:
        name = error.name or "transformers"
        raise missing(name, name) from error
    return Transformers(torch, transformers, compiled=sys.argv[1] == "transformers-compile")


def version_of(package):
    import importlib.metadata
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


class Transformers:
    """transformers' generate with a streamer, as users run it; int8 and nf4 by bitsandbytes."""

    capabilities = ["logits", "score", "memory", "depth", "batch", "encode_tokens", "encode_picture"]

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
            if limit := request.get("memory_limit_bytes"):
                total = torch.cuda.get_device_properties(self.device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), self.device)
        else:
            torch.set_num_threads(request["threads"])
        config = transformers.AutoConfig.from_pretrained(request["model"])
        self.kind = "vision" if config.model_type == "paligemma" else "encoder" if config.is_encoder_decoder else "causal"
        self.image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        kind = {"vision": transformers.AutoModelForImageTextToText, "encoder": transformers.AutoModelForSeq2SeqLM,
                "causal": transformers.AutoModelForCausalLM}[self.kind]
        options = self.options(precision, saved=getattr(config, "quantization_config", None))
        start = now_ns()
        self.model = kind.from_pretrained(request["model"], device_map={"": request["device"]}, **options).eval()
        if self.cuda:
            torch.cuda.synchronize()
        load_s = (now_ns() - start) / 1e9
        # The end of the text is a token like any other: exactly as many are generated as asked.
        settings = self.model.generation_config
        settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
        self.capacity, self.batch = request["capacity"], request.get("batch", 1)
        self.dtype = options["dtype"]
        self.filled, self.depth = None, []
        if self.compiled:
            self.watch_compiler()
        self.watch_steps()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        return dict(load_s=load_s, kernels=torch.backends.cpu.get_cpu_capability() if not self.cuda else torch.cuda.get_device_name(),
                    held=self.held(precision, request))

    def options(self, precision, saved=None):
        """What from_pretrained is asked for. Products of quantized layers are in fp32 on a CPU, where bitsandbytes is made for it. A
        checkpoint that was saved quantized is loaded as it is."""
        torch = self.torch
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
        if saved is None and precision in dtypes:
            return dict(dtype=dtypes[precision])
        try:
            import bitsandbytes
        except ImportError as error:
            raise missing("bitsandbytes", "bitsandbytes") from error
        dtype = torch.float16 if self.cuda else torch.float32
        if saved is not None:
            saved = saved if isinstance(saved, dict) else saved.to_dict()
            held = "int8" if saved.get("load_in_8bit") else {True: "nf4", False: "nf4-nodq"}[bool(saved.get("bnb_4bit_use_double_quant"))]
            if held != precision:
                raise Failure("error", f"the checkpoint was saved in `{held}`, and `{precision}` was asked for")
            return dict(dtype=dtype)
        if precision == "int8":
            settings = dict(load_in_8bit=True)
        elif precision in ("nf4", "nf4-nodq"):
            settings = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                            bnb_4bit_use_double_quant=precision == "nf4")
        else:
            raise Failure("error", f"transformers' adapter has no `{precision}`")
        return dict(dtype=dtype, quantization_config=self.transformers.BitsAndBytesConfig(**settings))

    def watch_compiler(self):
        """Has generate compile on every device, and notes that it does: where it cannot, it goes on without a word."""
        settings = self.transformers.CompileConfig()
        settings._compile_all_devices = True
        self.model.generation_config.compile_config, self.compiles = settings, False
        compiled_call = self.model.get_compiled_call

        def noted(*args, **kwargs):
            self.compiles = True
            return compiled_call(*args, **kwargs)

        self.model.get_compiled_call = noted

    def watch_steps(self):
        """Stamps the steps of generate, so that the host's time between them is known. On a CPU that is all but the model's forward. A
        GPU's forward returns early, and a compiled one is not looked into: there it is the time from a token to the next call's inputs."""
        self.inside = self.ready = 0
        if self.cuda or self.compiled:
            prepare = self.model.prepare_inputs_for_generation

            def stamped(*args, **kwargs):
                inputs = prepare(*args, **kwargs)
                self.ready = now_ns()
                return inputs

            # generate looks at the signature.
            stamped.__signature__ = inspect.signature(prepare)
            self.model.prepare_inputs_for_generation = stamped
            return
        forward = self.model.forward

        def timed(*args, **kwargs):
            start = now_ns()
            result = forward(*args, **kwargs)
            self.inside += now_ns() - start
            return result

        timed.__signature__ = inspect.signature(forward)
        self.model.forward = timed

    def held(self, precision, request):
        torch, model = self.torch, self.model
        names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "int8", torch.uint8: precision}
        by_format, sizes, wide, seen, experts = {}, {}, [], set(), {}
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
            if ".experts." in name:
                experts[kind] = experts.get(kind, 0) + size
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
            # Experts that are one tensor for all of a layer are no modules.
            wide += [name for name, (kind, _, _) in sizes.items() if ".experts." in name and kind in ("fp16", "bf16", "fp32")]
        text = model.config.get_text_config(decoder=True)
        chosen = getattr(text, "num_experts_per_tok", None)
        total = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
        if experts and chosen and total:
            # A token reads the experts that it chooses.
            read -= sum(experts.values()) * (total - chosen) // total
        layers = getattr(text, "num_decoder_layers", None) or text.num_hidden_layers
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or text.hidden_size // text.num_attention_heads
        element = torch.tensor([], dtype=self.dtype).element_size()
        per_position = 2 * layers * heads * width * element
        dtype = names[self.dtype]
        return dict(weights_by_format=by_format, weight_bytes_per_token=read, compute=dtype, logits=dtype,
                    head=of(head) if head is not None else None, embeddings=of(table),
                    experts=dict(format=max(experts, key=experts.get), bytes=sum(experts.values())) if experts else None,
                    kv_cache=dict(format=dtype, bytes=per_position * request["capacity"] * self.batch), kv_bytes_per_position=per_position,
                    wide_modules=wide[:64])

    def inputs(self, run):
        """The arguments of generate, on the device."""
        torch, encode = self.torch, run.get("encode") or "nothing"
        # The ids of a batch lie one behind the other, equally many of each sequence.
        ids = lambda tokens: torch.tensor(tokens, device=self.device).reshape(self.batch, -1)
        if self.kind == "encoder":
            tokens = ids(encode["tokens"])
            return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), decoder_input_ids=ids(run["prompt"]))
        tokens = ids(run["prompt"])
        given = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        if isinstance(encode, dict) and "picture" in encode:
            pixels = self.picture(encode["picture"]["pixels"])
            given["pixel_values"] = pixels.expand(self.batch, *pixels.shape[1:])
            given["token_type_ids"] = torch.zeros_like(tokens)
        return given

    def picture(self, path):
        if path not in self.pixels:
            from safetensors.torch import load_file
            self.pixels[path] = load_file(path)["pixels"][None].to(self.device, self.dtype)
        return self.pixels[path]

    def generate(self, run, cache=None, **more):
        n, depth = run["n_gen"], run.get("depth") or []
        if depth:
            # What stands in the cache is part of the input, and is not run again.
            more[self.cache_name()] = cache if cache is not None else self.behind(depth)
            run = dict(run, prompt=self.joined(depth, run["prompt"]))
        elif self.compiled:
            more["cache_implementation"] = "static"
        with self.torch.inference_mode():
            made = self.model.generate(**self.inputs(run), max_new_tokens=n, do_sample=False, num_beams=1,
                                       repetition_penalty=1.0, pad_token_id=0, **more)
        if self.compiled and n > 1 and not self.compiles:
            raise Failure("error", "transformers' generate does not compile this model here: measure it by `transformers`")
        return made

    def joined(self, depth, prompt):
        """The ids of each sequence behind those of its depth."""
        n, m = len(depth) // self.batch, len(prompt) // self.batch
        parts = (depth[at * n:(at + 1) * n] + prompt[at * m:(at + 1) * m] for at in range(self.batch))
        return [token for part in parts for token in part]

    def cache_name(self):
        """The argument that a cache is given by: releases differ."""
        names = inspect.signature(type(self.model).forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    def fill(self, depth):
        """A cache that holds the depth and has room for a run, made outside of what is timed."""
        if self.kind != "causal":
            raise Failure("error", "transformers' adapter runs behind a depth for causal models alone")
        if self.depth == depth:
            return
        self.filled, self.depth = None, []
        config = self.model.config.get_text_config(decoder=True)
        cache = self.transformers.StaticCache(config=config, max_cache_len=self.capacity) if self.compiled \
            else self.transformers.DynamicCache(config=config)
        with self.torch.inference_mode():
            # The first new token is chosen and not run: the cache holds the depth alone.
            self.model.generate(**self.inputs(dict(prompt=depth)), max_new_tokens=1, do_sample=False, num_beams=1,
                                pad_token_id=0, **{self.cache_name(): cache})
        if cache.get_seq_length() != len(depth) // self.batch:
            raise Failure("error", f"the cache holds {cache.get_seq_length()} tokens, not the depth of {len(depth) // self.batch}")
        self.filled, self.depth = cache, list(depth)

    def behind(self, depth):
        """The cache of the depth for one run: cut back to it, or, where layers forget what lies behind their window, copied."""
        self.fill(depth)
        windows = getattr(self.filled, "is_sliding", [])
        if any(windows if isinstance(windows, (list, tuple)) else [windows]):
            return copy.deepcopy(self.filled)
        more = self.filled.get_seq_length() - len(depth) // self.batch
        if more:
            self.filled.crop(-int(more))
        return self.filled

    def run(self, request):
        depth, cache = request.get("depth") or [], None
        if depth:
            cache = self.behind(depth)
        else:
            self.filled, self.depth = None, []
        if request["n_gen"] == 0:
            return {}
        streamer = Stamps(self)
        gc.collect()
        if self.cuda:
            self.torch.cuda.synchronize()
        self.inside, start = 0, now_ns()
        self.generate(request, cache=cache, streamer=streamer)
        stamps, inside, ready = streamer.stamps, streamer.inside, streamer.ready
        if self.cuda or self.compiled:
            host = [max(0, y - a) for a, y in zip(stamps, ready[1:])]
        else:
            host = [b - a - (y - x) for a, b, x, y in zip(stamps, stamps[1:], inside, inside[1:])]
        return dict(start_ns=start, token_ns=stamps, ids=streamer.ids, host_step_ns=host)

    def raw_logits(self, run, **more):
        made = self.generate(run, return_dict_in_generate=True, output_logits=True, **more)
        return self.torch.cat([row[:1].float() for row in made.logits])

    def logits(self, request):
        write_rows(request["file"], self.raw_logits(request["run"]).cpu().numpy())

    def score(self, request):
        tokens, first, prefix = request["tokens"], request["first"], request.get("prefix") or []
        run = dict(encode=request.get("encode"), n_gen=1)
        if request.get("by_token") or self.kind == "vision":
            # generate itself, with the text's tokens in place of those that it chooses. A picture's prompt sees itself whole, so that
            # it is a call of its own in any case.
            begin = prefix or tokens[:1]
            forced = tokens if prefix else tokens[1:]
            rows = self.raw_logits(dict(run, prompt=begin, n_gen=len(forced)), logits_processor=[Forced(len(begin), forced)])
            rows = rows[first - (len(tokens) - len(forced)):]
        else:
            keep = len(tokens) - first + 1
            kept = dict(logits_to_keep=keep) if "logits_to_keep" in \
                inspect.signature(type(self.model).forward).parameters else {}
            with self.torch.inference_mode():
                logits = self.model(**self.inputs(dict(run, prompt=prefix + tokens)), **kept).logits[0]
            # The last row predicts what the text does not hold.
            rows = logits[-keep:-1].float()
        write_rows(request["file"], rows.cpu().numpy())

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


class Forced:
    """A logits processor that leaves one token: the next of a given text behind `n_prompt` others."""

    def __init__(self, n_prompt, tokens):
        self.n_prompt, self.tokens = n_prompt, tokens

    def __call__(self, input_ids, scores):
        only = scores.new_full(scores.shape, float("-inf"))
        only[:, self.tokens[input_ids.shape[1] - self.n_prompt]] = 0
        return only


class Stamps:
    """A streamer: generate hands it the prompt, then each token when it is on the host."""

    def __init__(self, engine):
        self.stamps, self.ids, self.inside, self.ready, self.engine, self.prompt_comes = [], [], [], [], engine, True

    def put(self, tokens):
        if self.prompt_comes:
            self.prompt_comes = False
            return
        ids = tokens.tolist()
        self.stamps.append(now_ns())
        self.inside.append(self.engine.inside)
        self.ready.append(self.engine.ready)
        self.ids.extend(ids)

    def end(self):
        pass


serve(make)
