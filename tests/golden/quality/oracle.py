"""What nf4 and int8 cost SmolLM2-135M-Instruct in quality, by code that shares nothing with quantbench.

    python oracle.py FOLDER ../smollm2.json smollm2.json

FOLDER holds the checkpoint; the paragraph comes from the first file; the second is written. Needs torch, transformers,
bitsandbytes and numpy. The reference is fp32 compute over the fp16 weights.

nf4: the linears of all blocks hold what bitsandbytes dequantizes in fp32, with and without double quantization.
int8: LLM.int8 (Dettmers et al. 2022) written out in numpy over integers: absmax per row of the weights and per token, codes
from activations cast to fp16, columns with an entry of 6 or more in floating point. `decode` finds these columns for each
token, `prefill` for the whole text at once.
"""

import json
import sys

import numpy as np
import torch
import transformers
from bitsandbytes import functional

THRESHOLD = 6.0


def linears(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            yield name, module


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def nf4(model, double):
    for _, linear in linears(model):
        half = linear.weight.data.half()
        codes, state = functional.quantize_4bit(half, quant_type="nf4", compress_statistics=double, blocksize=64)
        state.dtype = torch.float32
        linear.weight.data = functional.dequantize_4bit(codes, state).float()


class Int8(torch.nn.Module):
    def __init__(self, linear, per_token):
        super().__init__()
        weight = linear.weight.data.half().float().numpy()
        self.absmax = np.abs(weight).max(axis=1)
        scale = np.float32(127.0) * (np.float32(1.0) / self.absmax)
        self.codes = np.rint(weight * scale[:, None]).astype(np.int32)
        self.weight = (self.codes * (self.absmax[:, None] / 127.0)).astype(np.float64)
        self.per_token = per_token

    def call(self, x):
        half = x.astype(np.float16).astype(np.float32)
        outlier = np.abs(half) >= THRESHOLD
        columns = outlier.any(axis=0)
        absmax = np.where(outlier, 0, np.abs(half)).max(axis=1)
        scale = np.float32(127.0) * (np.float32(1.0) / np.maximum(absmax, np.float32(1e-30)))
        codes = np.rint(np.where(columns, 0, half) * scale[:, None])
        # fp64 holds sums of so many products of codes exactly.
        dot = codes.astype(np.float64) @ self.codes.T.astype(np.float64)
        y = dot * (absmax[:, None].astype(np.float64) * self.absmax) / (127.0 * 127.0)
        return y + x[:, columns].astype(np.float64) @ self.weight[:, columns].T

    def forward(self, x):
        rows = x[0].numpy()
        if self.per_token:
            y = np.concatenate([self.call(row[None]) for row in rows])
        else:
            y = self.call(rows)
        return torch.from_numpy(y.astype(np.float32))[None]


def int8(model, per_token):
    for name, linear in list(linears(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Int8(linear, per_token))


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def cost(reference, measured, ids):
    p, q = log_softmax(reference[:-1]), log_softmax(measured[:-1])
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    rows = np.arange(len(ids) - 1)
    return {
        "n_tokens": len(ids) - 1,
        "nll_mean": float(-q[rows, ids[1:]].mean()),
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.percentile(kl, 99)),
        "top1_agreement": float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
    }


def main(folder, paragraph, out):
    ids = json.load(open(paragraph))["paragraph"]["input_ids"]
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference = logits(load(), ids)
    changes = {
        "fp16": lambda model: None,
        "nf4": lambda model: nf4(model, True),
        "nf4-nodq": lambda model: nf4(model, False),
        "int8.decode": lambda model: int8(model, True),
        "int8.prefill": lambda model: int8(model, False),
    }
    found = {}
    for name, change in changes.items():
        model = load()
        change(model)
        found[name] = cost(reference, logits(model, ids), ids)
        print(name, found[name], flush=True)
    with open(out, "w") as file:
        json.dump(
            {
                "command": "python oracle.py FOLDER ../smollm2.json smollm2.json",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "precisions": found,
            },
            file,
            indent=1,
        )
        file.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
