import ctypes
import gc


def make():
    try:
        import llama_cpp
    except ImportError as error:
        if getattr(error, "name", None) in ("llama_cpp", None):
            raise missing("llama_cpp", "llama-cpp-python") from error
        raise
    return LlamaCpp(llama_cpp)


class LlamaCpp:
    """llama.cpp by its C interface: llama_decode and its own greedy sampler, no array of logits in Python."""

    name = "llama.cpp"
    capabilities = ["logits", "score", "depth", "proceed"]

    def __init__(self, lib):
        self.lib, self.version = lib, f"llama-cpp-python {lib.__version__}"
        lib.llama_backend_init()
        # Its log goes to standard error, of which the parent keeps the end.
        self.context = self.model = self.sampler = None
        self.depth, self.position = [], 0

    def load(self, request):
        lib = self.lib
        path = self.quantized(request["model"], request["precision"], request["directory"], request["threads"])
        parameters = lib.llama_model_default_params()
        on_gpu = request["device"] != "cpu"
        parameters.n_gpu_layers = 999 if on_gpu else 0
        # No mapping: what is loaded counts as memory. Releases differ in the name of the setting.
        if hasattr(parameters, "use_mmap"):
            parameters.use_mmap = False
        else:
            parameters.load_mode = lib.LLAMA_LOAD_MODE_NONE
        if on_gpu:
            parameters.main_gpu = int(request["device"].split(":")[1])
        start = now_ns()
        self.model = lib.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise Failure("error", "llama.cpp could not load the model: its log is the end of this engine's standard error")
        settings = lib.llama_context_default_params()
        settings.n_ctx = max(request["capacity"], 8)
        settings.n_batch = settings.n_ubatch = max(min(request["capacity"], 2048), 8)
        settings.n_threads = settings.n_threads_batch = request["threads"]
        settings.no_perf = True
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise Failure("out_of_memory", "out of memory: llama.cpp could not make a context")
        load_s = (now_ns() - start) / 1e9
        if path != request["model"]:
            os.remove(path)
        self.batch_size = settings.n_batch
        self.sampler = lib.llama_sampler_init_greedy()
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.memory_of = lib.llama_get_memory(self.context)
        return dict(load_s=load_s, kernels=self.kernels(), held=self.held(path_bytes=lib.llama_model_size(self.model), request=request))

    def quantized(self, path, precision, directory, threads):
        """The file itself for F16; else what llama.cpp's quantizer makes of it."""
        lib = self.lib
        kinds = {"f16": None, "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0}
        if precision not in kinds:
            raise Failure("error", f"llama.cpp's adapter has no `{precision}`")
        if kinds[precision] is None:
            return path
        made = os.path.join(directory, f"{precision}.gguf")
        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = kinds[precision], threads
        if lib.llama_model_quantize(path.encode(), made.encode(), ctypes.byref(parameters)):
            raise Failure("error", f"llama.cpp's quantizer made no {precision} of the model")
        self.parts = gguf_parts(made)
        return made

    def kernels(self):
        words = self.lib.llama_print_system_info().decode().split("|")
        on = [word.split("=")[0].split(":")[-1].strip() for word in words if word.strip().endswith("= 1")]
        return " ".join(word for word in on if word.isupper() or "_" in word)[:200]

    def held(self, path_bytes, request):
        parts = getattr(self, "parts", None) or gguf_parts(request["model"])
        by_format, read = {}, 0
        tied = "output.weight" not in parts
        for name, (kind, size, rows) in parts.items():
            by_format[kind] = by_format.get(kind, 0) + size
            # Of embeddings a step reads one row, unless they are the head as well.
            read += size if name != "token_embd.weight" or tied else size // rows
        head = parts.get("output.weight", parts["token_embd.weight"])
        embeddings = parts["token_embd.weight"]
        lib = self.lib
        heads, kv, width = lib.llama_model_n_head(self.model), lib.llama_model_n_head_kv(self.model), lib.llama_model_n_embd(self.model)
        per_position = 2 * 2 * lib.llama_model_n_layer(self.model) * kv * (width // heads)
        context = lib.llama_n_ctx(self.context)
        wide = [name for name, (kind, _, rows) in parts.items() if kind in ("f16", "f32") and rows > 1]
        return dict(
            weights_by_format=by_format,
            weight_bytes_per_token=read,
            compute="f32 sums, activations quantized to 8 bit" if request["precision"] != "f16" else "f16 products, f32 sums",
            logits="f32",
            head=dict(format=head[0], bytes=head[1]),
            embeddings=dict(format=embeddings[0], bytes=embeddings[1]),
            kv_cache=dict(format="f16", bytes=per_position * context),
            kv_bytes_per_position=per_position,
            wide_modules=wide if request["precision"] != "f16" else [],
        )

    def decode(self, tokens, all_rows=False):
        """Runs tokens behind the cache, in pieces that fit a batch; the last one's logits stay with llama.cpp."""
        for first in range(0, len(tokens), self.batch_size):
            piece = tokens[first:first + self.batch_size]
            array = (self.lib.llama_token * len(piece))(*piece)
            status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(piece)))
            if status:
                raise Failure("out_of_memory" if status == 1 else "error", f"llama_decode gave {status}")
        self.position += len(tokens)

    def rewind(self, position):
        if position == 0:
            self.lib.llama_memory_clear(self.memory_of, False)
        else:
            self.lib.llama_memory_seq_rm(self.memory_of, -1, position, -1)
        self.position = position

    def fill(self, depth):
        if self.depth != depth:
            self.depth = []
            self.rewind(0)
            if depth:
                self.decode(depth)
            self.depth = list(depth)
        self.rewind(len(depth))

    def run(self, request):
        lib, context, sampler = self.lib, self.context, self.sampler
        n_gen, proceed = request["n_gen"], request.get("proceed")
        if not proceed:
            self.fill(request.get("depth", []))
        if n_gen == 0:
            return {}
        stamps, ids, host = [], [], []
        sample, decode, one = lib.llama_sampler_sample, lib.llama_decode, lib.llama_token * 1
        if proceed:
            token = one(self.last)
            batch = lib.llama_batch_get_one(token, 1)
            start = now_ns()
        else:
            start = now_ns()
            self.decode(request["prompt"])
            first = sample(sampler, context, -1)
            stamps.append(now_ns())
            ids.append(first)
            token = one(first)
            batch = lib.llama_batch_get_one(token, 1)
        gc.disable()
        before = stamps[-1] if stamps else start
        while len(ids) < n_gen:
            called = now_ns()
            if decode(context, batch):
                raise Failure("error", "llama_decode failed in a step")
            returned = now_ns()
            token[0] = sample(sampler, context, -1)
            stamp = now_ns()
            stamps.append(stamp)
            ids.append(token[0])
            host.append((called - before) + (stamp - returned))
            before = stamp
            self.position += 1
        gc.enable()
        self.last = ids[-1]
        return dict(start_ns=start, token_ns=stamps, ids=ids, host_step_ns=host)

    def row(self):
        import numpy
        return numpy.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocab,)).copy()

    def logits(self, request):
        import numpy
        run = request["run"]
        self.fill(run.get("depth", []))
        self.decode(run["prompt"])
        rows = [self.row()]
        while len(rows) < run["n_gen"]:
            self.decode([int(rows[-1].argmax())])
            rows.append(self.row())
        write_rows(request["file"], numpy.stack(rows))

    def score(self, request):
        import numpy
        self.depth = []
        self.rewind(0)
        if request.get("prefix"):
            self.decode(request["prefix"])
        rows, tokens, first = [], request["tokens"], request["first"]
        for at, token in enumerate(tokens):
            if at >= first:
                rows.append(self.row())
            if at + 1 < len(tokens):
                self.decode([token])
        write_rows(request["file"], numpy.stack(rows))

    def finish(self, request):
        return {}


def gguf_parts(path):
    """Format, bytes and rows of each tensor, by name."""
    kinds = {0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 8: ("q8_0", 32, 34), 14: ("q6_k", 256, 210)}
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    with open(path, "rb") as file:
        number = lambda size: int.from_bytes(file.read(size), "little")
        text = lambda: file.read(number(8)).decode()

        def skip(kind):
            if kind == 8:
                text()
            elif kind == 9:
                inner, count = number(4), number(8)
                for _ in range(count):
                    skip(inner)
            else:
                file.read(sizes[kind])

        file.read(8)
        n_tensors, n_keys = number(8), number(8)
        for _ in range(n_keys):
            text()
            skip(number(4))
        parts = {}
        for _ in range(n_tensors):
            name, dims = text(), [number(8) for _ in range(number(4))]
            kind, block, size = kinds.get(number(4), ("other", 1, 0))
            number(8)
            count = 1
            for dim in dims:
                count *= dim
            parts[name] = kind, count // block * size, count // dims[0]
        return parts


serve(make)
