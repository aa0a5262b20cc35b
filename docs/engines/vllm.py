"""vLLM's offline engine, prefix caching off: `--engine "vllm=python3 docs/engines/vllm.py"`.

NEVER RUN AGAINST THE REAL PACKAGE. It shows where the parts of such an engine go: vLLM's own loop makes the tokens, so each is stamped
as `step` returns it.
"""
import json
import os
import socket
import time


def main():
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt

    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["QUANTBENCH_SOCKET"])
    lines = connection.makefile("rw")
    engine = None

    def send(kind, **fields):
        lines.write(json.dumps({kind: fields}) + "\n")
        lines.flush()

    def load(request):
        nonlocal engine
        formats = {"fp16": dict(dtype="float16"), "bf16": dict(dtype="bfloat16"), "nf4": dict(quantization="bitsandbytes")}
        engine = LLMEngine.from_engine_args(EngineArgs(
            model=request["model"], max_model_len=request["capacity"], enable_prefix_caching=False, max_num_seqs=1,
            seed=request["seed"], skip_tokenizer_init=True, **formats[request["precision"]]))
        send("load", held={"compute": "fp16"})

    def run(request):
        settings = SamplingParams(temperature=0.0, max_tokens=request["n_gen"], ignore_eos=True, detokenize=False)
        start, stamps, ids = time.monotonic_ns(), [], []
        engine.add_request("run", TokensPrompt(prompt_token_ids=request["prompt"]), settings)
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = time.monotonic_ns()
                new = list(output.outputs[0].token_ids)[len(ids):]
                ids += new
                stamps += [now] * len(new)
        send("run", start_ns=start, token_ns=stamps, ids=ids)

    send("hello", protocol=2, engine="vllm", version=vllm.__version__)
    for line in lines:
        (kind, request), = json.loads(line).items()
        try:
            if kind == "finish":
                send("finish")
            else:
                {"load": load, "run": run}[kind](request)
        except Exception as error:
            kind = "out_of_memory" if "out of memory" in str(error).lower() else "error"
            send("failed", kind=kind, message=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
