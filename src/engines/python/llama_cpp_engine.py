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
        # Its log goes to standard error, of which the parent keeps the end; what it says of errors stands in a failure, too.
        self.said = []
        self.on_log = lib.llama_log_callback(self.log)
        lib.llama_log_set(self.on_log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.context = self.model = self.sampler = None
        self.depth, self.position = [], 0

    def log(self, level, text, _):
        # Levels: 1 is for debugging, 3 a warning, 4 an error.
        if level != 1:
            os.write(2, text)
        if level in (3, 4):
            self.said = self.said[-9:] + [text.decode("utf-8", "replace").strip()]

    def refused(self, what):
        """The failure of a call, by what the log said of it."""
        said = "; ".join(self.said[-3:])
        return Failure("out_of_memory" if is_out_of_memory(said) else "error", f"{what}: {said}" if said else what)

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
            raise self.refused("llama.cpp could not load the model")
        settings = lib.llama_context_default_params()
        settings.n_ctx = max(request["capacity"], 8)
        settings.n_batch = settings.n_ubatch = max(min(request["capacity"], 2048), 8)
        settings.n_threads = settings.n_threads_batch = request["threads"]
        settings.no_perf = True
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise self.refused("llama.cpp could not make a context")
        load_s = (now_ns() - start) / 1e9
        if path != request["model"]:
            os.remove(path)
        self.batch_size = settings.n_batch
        self.sampler = lib.llama_sampler_init_greedy()
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.memory_of = lib.llama_get_memory(self.context)
        return dict(load_s=load_s, kernels=self.kernels(), held=self.held(request))

    def quantized(self, path, precision, directory, threads):
        """The file itself where that is asked for, or where its blocks are quantized already; else what llama.cpp's quantizer makes of it."""
        lib = self.lib
        self.parts, self.keys = gguf_parts(path)
        if any(kind not in PLAIN for kind, _, _ in self.parts.values()):
            return path
        kinds = {"f16": None, "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0}
        if precision not in kinds:
            raise Failure("error", f"llama.cpp's adapter has no `{precision}`")
        if kinds[precision] is None:
            return path
        made = os.path.join(directory, f"{precision}.gguf")
        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = kinds[precision], threads
        if lib.llama_model_quantize(path.encode(), made.encode(), ctypes.byref(parameters)):
            raise self.refused(f"llama.cpp's quantizer made no {precision} of the model")
        self.parts, _ = gguf_parts(made)
        return made

    def kernels(self):
        words = self.lib.llama_print_system_info().decode().split("|")
        on = [word.split("=")[0].split(":")[-1].strip() for word in words if word.strip().endswith("= 1")]
        return " ".join(word for word in on if word.isupper() or "_" in word)[:200]

    def held(self, request):
        lib, parts, by_format, read = self.lib, self.parts, {}, 0
        tied = "output.weight" not in parts
        for name, (kind, size, rows) in parts.items():
            by_format[kind] = by_format.get(kind, 0) + size
            # Of embeddings a step reads one row, unless they are the head as well.
            read += size if name != "token_embd.weight" or tied else size // rows
        head = parts.get("output.weight", parts["token_embd.weight"])
        embeddings = parts["token_embd.weight"]
        family = self.keys.get("general.architecture", "")
        heads, kv = lib.llama_model_n_head(self.model), lib.llama_model_n_head_kv(self.model)
        length = lambda key: self.keys.get(f"{family}.attention.{key}_length") or lib.llama_model_n_embd(self.model) // heads
        # Keys and values in f16.
        per_position = 2 * lib.llama_model_n_layer(self.model) * kv * (length("key") + length("value"))
        # The embedding is looked up, and vectors have one row.
        matrices = {name: kind for name, (kind, _, rows) in parts.items() if rows > 1 and (name != "token_embd.weight" or tied)}
        is_plain = all(kind in PLAIN for kind in matrices.values())
        return dict(
            weights_by_format=by_format,
            weight_bytes_per_token=read,
            compute="f16 products, f32 sums" if is_plain else "f32 sums, activations quantized to 8 bit",
            logits="f32",
            head=dict(format=head[0], bytes=head[1]),
            embeddings=dict(format=embeddings[0], bytes=embeddings[1]),
            kv_cache=dict(format="f16", bytes=per_position * lib.llama_n_ctx(self.context)),
            kv_bytes_per_position=per_position,
            wide_modules=[] if is_plain else [name for name, kind in matrices.items() if kind in PLAIN],
        )

    def decode(self, tokens):
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

    def row(self, at=-1):
        import numpy
        return numpy.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, at), (self.vocab,)).copy()

    def decode_rows(self, tokens, first):
        """Runs tokens behind the cache, in pieces that fit a batch, and gives the logits behind each from `first` on."""
        lib, rows = self.lib, []
        batch = lib.llama_batch_init(self.batch_size, 0, 1)
        try:
            for begin in range(0, len(tokens), self.batch_size):
                piece = tokens[begin:begin + self.batch_size]
                batch.n_tokens = len(piece)
                for at, token in enumerate(piece):
                    batch.token[at], batch.pos[at] = token, self.position + at
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                    batch.logits[at] = begin + at >= first
                status = lib.llama_decode(self.context, batch)
                if status:
                    raise self.refused(f"llama_decode gave {status}")
                rows += [self.row(at) for at in range(len(piece)) if begin + at >= first]
                self.position += len(piece)
        finally:
            lib.llama_batch_free(batch)
        return rows

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
        tokens, first, rows = request["tokens"], request["first"], []
        if request.get("prefix"):
            self.decode(request["prefix"])
        if first == 0:
            rows.append(self.row())
        # The last token predicts what the text does not hold.
        if request.get("by_token"):
            for at, token in enumerate(tokens[:-1]):
                self.decode([token])
                if at + 1 >= first:
                    rows.append(self.row())
        else:
            rows += self.decode_rows(tokens[:-1], max(first - 1, 0))
        write_rows(request["file"], numpy.stack(rows))

    def finish(self, request):
        return {}


# Formats of plain values.
PLAIN = "f32", "f16", "bf16"

# ggml's types: name, values of a block, bytes of a block.
TYPES = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210), 16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18), 42: ("q2_0", 64, 18),
}


def gguf_parts(path):
    """Format, bytes and rows of each tensor by name, and the keys of the file that are texts or whole numbers."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    with open(path, "rb") as file:
        number = lambda size: int.from_bytes(file.read(size), "little")
        text = lambda: file.read(number(8)).decode("utf-8", "replace")

        def value(kind):
            if kind == 8:
                return text()
            if kind == 9:
                inner, count = number(4), number(8)
                for _ in range(count):
                    value(inner)
                return None
            # Floating point and flags are of no use here.
            return number(sizes[kind]) if kind not in (6, 7, 12) else file.read(sizes[kind]) and None

        file.read(8)
        n_tensors, n_keys = number(8), number(8)
        keys = {}
        for _ in range(n_keys):
            name = text()
            keys[name] = value(number(4))
        parts = {}
        for _ in range(n_tensors):
            name, dims = text(), [number(8) for _ in range(number(4))]
            kind = number(4)
            if kind not in TYPES:
                raise Failure("error", f"tensor `{name}` is of ggml's type {kind}, which this adapter does not know")
            format, block, size = TYPES[kind]
            number(8)
            count = 1
            for dim in dims:
                count *= dim
            parts[name] = format, count // block * size, count // dims[0]
        return parts, keys


serve(make)
