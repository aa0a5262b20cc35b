"""What a record says, and how a printed number is held against it."""
import re
from decimal import Decimal

GIB, MIB = 1 << 30, 1 << 20
NUMBER = r"-?\d+(?:\.\d+)?"
OWN = "quantbench"


# The program reads a number of a file to within a unit of its last binary place, which is this share of it at most.
LAST_PLACE = 2.0**-52


def same(a, b):
    """Equal, and numbers but for the last place that reading them may cost."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return None not in (a, b) and abs(a - b) <= LAST_PLACE * abs(b)
    return a == b


class Checks:
    """What was compared, and what was wrong."""

    def __init__(self):
        self.n, self.errors, self.where = 0, [], ""

    def fail(self, what):
        self.errors.append(f"{self.where}: {what}")

    def number(self, printed, value, what):
        """`printed` is `value` at the decimals that it has."""
        self.n += 1
        if value is None:
            return self.fail(f"{what}: `{printed}` is shown, and the JSON has nothing")
        decimals = len(printed.partition(".")[2])
        # Half a unit of the last place, and what binary fractions add to a tie.
        allowed = Decimal("0.5") * Decimal(10) ** -decimals * (1 + Decimal("1e-9")) + abs(Decimal(value)) * Decimal("1e-15")
        if abs(Decimal(printed) - Decimal(value)) > allowed:
            self.fail(f"{what}: `{printed}` is shown, and the JSON has {value}")

    def cell(self, text, values, what):
        """All numbers of a cell, in order; `None` for a dash."""
        found = re.findall(NUMBER, text)
        if values is None or any(value is None for value in values):
            if text != "-":
                self.fail(f"{what}: `{text}` is shown, and the JSON has {values}")
            return
        if len(found) != len(values):
            return self.fail(f"{what}: `{text}` is shown for {values}")
        for printed, value in zip(found, values):
            self.number(printed, value, what)

    def equal(self, seen, expected, what):
        self.n += 1
        if not same(seen, expected):
            self.fail(f"{what}: {seen!r} is shown, and the JSON has {expected!r}")

    def rest(self, text, what):
        """Nothing that is left over holds a digit."""
        for left in re.findall(r"\S*\d\S*", text):
            self.fail(f"{what}: `{left}` belongs to nothing, in `{text.strip()[:160]}`")


def metric(key, what="median"):
    return lambda r: (r["metrics"].get(key) or {}).get(what)


def with_interval(*values):
    """The number alone, or with both ends."""
    return [values[0]] if values[1] is None or values[2] is None else list(values)


def interval(key):
    """The median with its interval, or with the ends of several repeats that are too few for one."""
    def values(r):
        ends = ("min", "max") if metric(key, "ci95_low")(r) is None and (metric(key, "n")(r) or 0) > 1 else ("ci95_low", "ci95_high")
        return with_interval(*(metric(key, end)(r) for end in ("median", *ends)))

    return values


def one(value):
    return lambda r: [value(r)]


def at(*path, scale=1):
    def value(r):
        for key in path:
            r = r.get(key) if isinstance(r, dict) else None
        return None if r is None else r / scale if scale != 1 else r

    return value


def is_baseline(r):
    own = r["engine"]["name"] == OWN and not r["samples"].get("imported")
    return own and r["precision"] == "fp16" and metric("decode_tps")(r) is not None


def ratio(key):
    return lambda r: [(r["ratio_to_fp16"] or {}).get(key, 1.0 if is_baseline(r) and key in ("median", "by_bytes") else None)]


def quality(key, scale=1):
    return at("quality", key, scale=scale)


def kl(r):
    mean, half = quality("kl_mean")(r), quality("kl_mean_half_width")(r)
    return [mean] if half is None else [mean, mean - half, mean + half]


def perplexity_ratio(r):
    if r["precision"] == "fp16":
        return [None]
    return with_interval(*(quality("perplexity_ratio" + end)(r) for end in ("", "_ci95_low", "_ci95_high")))


def when(tells, key, shown):
    """A speed that stands in one of two columns, by whether another column tells it."""
    def value(r):
        return shown(r) if (metric(tells)(r) is None) == (key == "alone") else [None]

    return value


def of_cold_run(key):
    return lambda r: [metric(key)(r) if r["protocol"]["method"] in ("single-cold-run", "seed") else None]


def percent(value):
    return lambda r: [None if value(r) is None else 100 * value(r)]


def between(r):
    found = r["ratio_to_fp16"] or {}
    return [found.get("ci95_low"), found.get("ci95_high")]


# Of the readable tables, by name and unit.
COLUMNS = {
    ("decode", "tokens/s"): interval("decode_tps"),
    ("speed-up", "x fp16"): ratio("median"),
    ("bytes ratio", "fp16 / this"): ratio("by_bytes"),
    ("of read bandwidth", "%"): percent(at("bandwidth", "mbu")),
    ("memory alone", "% of step"): percent(at("bandwidth", "memory_alone_share")),
    ("arithmetic alone", "% of step"): percent(at("bandwidth", "arithmetic_alone_share")),
    ("peak", "GiB"): one(at("memory", "peak_bytes", scale=GIB)),
    ("weights", "GiB"): one(at("memory", "weights_bytes", scale=GIB)),
    ("TTFT", "ms"): one(metric("ttft_ms")),
    ("prefill", "tokens/s"): when("ttft_ms", "alone", interval("prefill_tps")),
    ("output", "tokens/s"): when("decode_tps", "alone", interval("output_tps")),
    ("KL", "nats/token"): kl,
    ("throughput", "one cold run"): of_cold_run("output_tps"),
    ("latency", "s, cold"): of_cold_run("latency_s"),
    ("per token", "ms, cold"): of_cold_run("latency_per_token_ms"),
    ("top-1", "%"): percent(quality("top1_agreement")),
    ("perplexity", "x fp16"): perplexity_ratio,
    ("speed-up", "95 % interval"): between,
    ("end to end", "ms/token"): one(metric("latency_per_token_ms")),
    ("decode", "waiting/token"): one(metric("decode_synced_tps")),
    ("energy", "J/token"): one(metric("joules_per_token")),
    ("start", "GiB"): one(at("memory", "start_bytes", scale=GIB)),
    ("end", "GiB"): one(at("memory", "end_bytes", scale=GIB)),
    ("ITL p50", "ms"): one(metric("itl_ms", "p50")),
    ("ITL p95", "ms"): one(metric("itl_ms", "p95")),
    ("ITL p99", "ms"): one(metric("itl_ms", "p99")),
    ("load", "s"): one(metric("load_s")),
    ("prefill speed", "tokens/s"): when("ttft_ms", "beside", lambda r: [metric("prefill_tps")(r)]),
    ("output speed", "tokens/s"): when("decode_tps", "beside", lambda r: [metric("output_tps")(r)]),
    ("outliers", "columns/call"): one(at("int8", "outlier_columns_mean")),
    ("cold run", "s"): one(at("samples", "cold_ns", scale=1e9)),
    ("perplexity", ""): one(quality("perplexity")),
    ("KL p50", "nats/token"): one(quality("kl_median")),
    ("KL p99", "nats/token"): one(quality("kl_p99")),
    ("logit error", "largest"): one(quality("logit_error_max")),
}
WORDS = {("bound by", "")}


def name(r):
    """As tables label a row, without its engine where that is ours."""
    precision = r["precision"] or "unknown precision"
    if r["engine"]["name"] == OWN:
        return precision
    held = r["dtypes"].get("weights")
    return f"{precision} by {r['engine']['name']}" + (f" in {held}" if held and held != r["precision"] else "")


def lengths(r):
    w = r["workload"]
    image = f"{w['n_image']} image + " if w["n_image"] else ""
    depth = f" after {w['n_depth']} in the cache" if w["n_depth"] else ""
    batch = f", batch {w['batch_size']}" if w["batch_size"] > 1 else ""
    return f"{image}{w['n_prompt']} prompt + {w['n_gen']} new token{'' if w['n_gen'] == 1 else 's'}{depth}{batch}"


def plain(text):
    text = "; ".join(line.rstrip() for line in text.splitlines())
    return "".join(c for c in text if not (ord(c) < 32 or 127 <= ord(c) < 160))


class Rows:
    """Gives out each record once, to the rows that show it."""

    def __init__(self, document):
        self.left = list(document["records"])

    def take(self, label, title):
        """The next record under this title with this label."""
        label = label.rstrip("*").partition(" · ")[0]
        for r in self.left:
            is_quality = r["quality"] and not r["samples"]["end_to_end_ns"]
            works = f"quality over {r['quality']['n_tokens']} tokens" if is_quality else lengths(r)
            on = r["device"]["name"] or ""
            if plain(r["model"]["id"]) in title and plain(on) in title and (works in title or r["status"] != "ok"):
                if label in (name(r), r["precision"] or "unknown precision"):
                    self.left.remove(r)
                    return r
        return None
