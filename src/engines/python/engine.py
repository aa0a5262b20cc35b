"""The connection of an engine that quantbench starts: one JSON object a line over a Unix socket.

An engine is an object with `name`, `version`, `capabilities` and a method for each request that it answers:
load, run, logits, score, memory, finish. Each takes the request's fields as a dictionary and gives the reply's.
"""
import json
import os
import socket
import sys
import time

now_ns = time.monotonic_ns


class Failure(Exception):
    """A failure of a kind that the parent tells apart: bad_input, out_of_memory, invalid, error."""

    def __init__(self, kind, message, **fields):
        super().__init__(message)
        self.fields = dict(kind=kind, message=message, **fields)


def is_out_of_memory(error):
    words = str(error).lower()
    known = "out of memory", "can't allocate memory", "cannot allocate memory", "failed to allocate", "unable to allocate"
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or any(w in words for w in known)


def failure_of(error):
    if isinstance(error, Failure):
        return error.fields
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return dict(kind="out_of_memory" if is_out_of_memory(error) else "error", message=message[:2000])


def missing(module, package):
    return Failure("error", f"the package `{package}` is missing (no module `{module}`): `{sys.executable} -m pip install {package}`")


def numbers(version):
    """The leading numbers of a version: `0.3.36.dev0` is [0, 3, 36]."""
    found = []
    for part in version.split("."):
        digits = part[:len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return found


def check_versions():
    """Refuses packages that are older than the arguments `package>=version` say."""
    import importlib.metadata
    for word in sys.argv[2:]:
        package, least = word.split(">=")
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # One that is not there is missing where it is imported.
            continue
        if numbers(version) < numbers(least):
            raise Failure("error", f"the package `{package}` is {version}, and {least} or newer is needed: "
                                   f"`{sys.executable} -m pip install --upgrade {package}`")


def limit_memory(wanted):
    """Lets the process allocate so many bytes more than it has."""
    import resource
    with open("/proc/self/status") as file:
        held = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + wanted, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def write_rows(path, rows):
    """Writes numpy fp32 [rows, vocab] as tensor `logits` of a safetensors file."""
    header = {"logits": {"dtype": "F32", "shape": list(rows.shape), "data_offsets": [0, rows.nbytes]}}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        rows.astype("<f4", copy=False).tofile(file)


def serve(make):
    """Connects, greets with what `make` gives after its imports, and answers until the parent is gone."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["QUANTBENCH_SOCKET"])
    lines = connection.makefile("rw", encoding="utf-8", newline="\n")

    def send(kind, fields):
        lines.write(json.dumps({kind: fields}) + "\n")
        lines.flush()

    try:
        check_versions()
        engine = make()
    except Exception as error:
        return send("failed", failure_of(error))
    send("hello", dict(protocol=2, engine=engine.name, version=engine.version, capabilities=engine.capabilities))
    for line in lines:
        (kind, request), = json.loads(line).items()
        try:
            answer = getattr(engine, kind, None)
            if answer is None:
                raise Failure("error", f"this engine does not answer `{kind}`")
            if kind == "load" and request.get("memory_limit_bytes") and request["device"] == "cpu":
                limit_memory(request["memory_limit_bytes"])
            reply = answer(request) or {}
        except Exception as error:
            import traceback
            traceback.print_exc()
            send("failed", failure_of(error))
        else:
            send(kind, reply)
