"""The smallest engine: it "generates" by counting. Put a model's load and steps in their places."""
import json
import os
import socket
import time

connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["QUANTBENCH_SOCKET"])
lines = connection.makefile("rw")
model = None


def send(kind, **fields):
    lines.write(json.dumps({kind: fields}) + "\n")
    lines.flush()


def load(request):
    global model
    with open(os.path.join(request["model"], "config.json")) as file:
        model = json.load(file)
    send("load", held={"weights_by_format": {request["precision"]: 0}})


def run(request):
    start, stamps, ids = time.monotonic_ns(), [], []
    token = request["prompt"][-1]
    while len(ids) < request["n_gen"]:
        token = (token + 1) % model["vocab_size"]
        ids.append(token)
        stamps.append(time.monotonic_ns())
    send("run", start_ns=start, token_ns=stamps, ids=ids, finite_logits=True)


send("hello", protocol=2, engine="minimal", version="1.0")
for line in lines:
    (kind, request), = json.loads(line).items()
    try:
        if kind == "finish":
            send("finish")
        else:
            {"load": load, "run": run}[kind](request)
    except Exception as error:
        send("failed", kind="error", message=repr(error))
