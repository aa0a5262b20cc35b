"""Titles, verdicts, notes and warnings: every number in a sentence belongs to a record that the sentence names."""
import re

from record import GIB, NUMBER, at, between, interval, lengths, metric, name, percent, perplexity_ratio, plain, quality, ratio


def masks(document):
    """Texts of the JSON that may stand in an output as they are, the longest first."""
    texts = set()
    for r in document["records"]:
        e = r["environment"]
        texts |= {r["model"]["id"], r["command"], r["timestamp"], r["precision"], r["device"]["name"], r["reason"], r["model"]["revision"]}
        texts |= {r["engine"]["version"], r["engine"]["commit"], *r["warnings"], *r["keep_fp16"], r["weights"]["hash"]}
        texts |= {e[key] for key in ("cpu", "isa", "os", "gpu", "driver", "cuda")} | {r["weights"]["dtype"], r["dtypes"]["weights"]}
        if r["quality"]:
            texts |= {r["quality"]["text"], *r["quality"]["suggested_keep_fp16"]} | {m["module"] for m in r["quality"]["modules"]}
    texts = {plain(text) for text in texts if text and re.search(r"\d", text)}
    return sorted(texts | {"fp16"}, key=len, reverse=True)


def masked(text, document):
    for known in masks(document):
        text = re.sub(rf"(?<![\w.]){re.escape(known)}(?!\w)", "\u2026", text)
    return text


def title(checks, text, records, document):
    """Model, machine and lengths of a case."""
    first = next((r for r in records if r["status"] == "ok"), records[0])
    for what in (lengths(first), f"{first['environment']['threads']} thread"):
        text = text.replace(what, "", 1)
        checks.n += 1
    if first["quality"]:
        checks.number(*re.search(r"over (\d+) tokens", text).groups(), first["quality"]["n_tokens"], "title") if "over" in text else None
        text = re.sub(r"over \d+ tokens", "", text)
    checks.rest(masked(text, document), "title")


def scope(workload):
    """Sequences, tokens of a picture where there are any, of prompt and generation, and the depth, which stands where it is not 0."""
    image = [workload["n_image"]] if workload["n_image"] else []
    return [workload["batch_size"], *image, workload["n_prompt"], workload["n_gen"], workload["n_depth"]]


def verdict(checks, text, records, document):
    """Each number belongs to the precision that was named last before it."""
    by_label = {}
    for r in records:
        by_label.setdefault(r["precision"] or "unknown precision", r)
        by_label.setdefault(name(r), r)
        by_label.setdefault(f"{r['engine']['name']}'s {r['precision']}", r)
    fp16 = by_label.get("fp16", records[0])
    state = {"r": records[0], "speed": "decode_tps"}
    gib = lambda r: at("memory", "peak_bytes", scale=GIB)(r)
    r = lambda: state["r"]

    def numbers(match, values, what):
        for printed, value in zip([group for group in match.groups() if group is not None], values):
            checks.number(printed, value, f"verdict, {what}")

    def speed(match):
        numbers(match, interval(state["speed"])(r()), state["speed"])

    def alone(r):
        return [*percent(at("bandwidth", "memory_alone_share"))(r), *percent(at("bandwidth", "arithmetic_alone_share"))(r)]

    def saved(match):
        numbers(match, [gib(fp16) - gib(r()), gib(fp16)], "peak memory")

    def taken(match):
        numbers(match, [gib(r()) - gib(fp16), gib(fp16)], "peak memory")

    n, pair = f"({NUMBER})", rf"(?: \[({NUMBER}), ({NUMBER})\])?"
    ends = lambda: [quality("perplexity_ratio_ci95_low")(r()), quality("perplexity_ratio_ci95_high")(r())]
    rules = [
        (rf"{n}x fp16's perplexity{pair}", lambda m: numbers(m, perplexity_ratio(r()), "perplexity")),
        (rf"can't tell its perplexity from fp16's: {n}x to {n}x", lambda m: numbers(m, ends(), "perplexity")),
        (rf"can't tell, {n}x to {n}x", lambda m: numbers(m, between(r()), "speed-up")),
        (rf"no difference within 5 %, {n}x to {n}x fp16", lambda m: numbers(m, between(r()), "speed-up")),
        (rf"{n}x fp16{pair}", lambda m: numbers(m, [*ratio("median")(r()), *between(r())], "speed-up")),
        (rf"too few repeats \({n}\)", lambda m: numbers(m, [metric("decode_tps", "n")(r())], "repeats")),
        (rf"{n} tokens/s{pair}", speed),
        (rf"at {n} % of the read bandwidth", lambda m: numbers(m, percent(at("bandwidth", "mbu"))(r()), "bandwidth")),
        (
            rf"reading alone takes {n} % of a step, arithmetic alone {n} %",
            lambda m: numbers(m, alone(r()), "alone"),
        ),
        (rf"the device works {n} % of a step", lambda m: numbers(m, percent(at("bandwidth", "device_share"))(r()), "device")),
        (rf"saves {n} of {n} GiB peak memory", saved),
        (rf"takes {n} GiB more peak memory than fp16's {n}", taken),
        (rf"on {n} % of next tokens", lambda m: numbers(m, percent(quality("top1_agreement"))(r()), "top-1")),
        (rf"in {n} GiB", lambda m: numbers(m, [at("card_bytes", scale=GIB)(records[0])], "card")),
        (rf"batch {n}, (?:{n}\+)?{n}\+{n}(?: @{n})? tokens", lambda m: numbers(m, scope(records[0]["workload"]), "scope")),
        (r"1 new token takes no decode step", lambda m: checks.equal(records[0]["workload"]["n_gen"], 1, "verdict, new tokens")),
        (r"the prompt is processed at", lambda m: state.update(speed="prefill_tps")),
        (r"generated tokens over all of the time", lambda m: state.update(speed="output_tps")),
        (r"(?:than|from|with) fp16(?:'s)?", lambda m: None),
        (r"the fp32 reference", lambda m: None),
    ]
    labels = sorted(by_label, key=len, reverse=True)
    rules += [(rf"(?<![\w.]){re.escape(label)}(?![\w'-])", lambda m, found=by_label[label]: state.update(r=found)) for label in labels]
    left, at_ = "", 0
    while at_ < len(text):
        for pattern, rule in rules:
            match = re.compile(pattern).match(text, at_)
            # A number is not taken from the middle of a word or of another number.
            if match and not (at_ and re.match(r"[\w.]", text[at_ - 1]) and re.match(r"[\w.]", text[at_])):
                rule(match)
                at_ = match.end()
                left += " "
                break
        else:
            left += text[at_]
            at_ += 1
    checks.rest(masked(left, document), "verdict")


NOTES = [
    "[low, high] is a 95 % interval",
    "(least to greatest) of the repeats, which are too few for an interval",
    "speed-ups are medians of paired repeats, so they need not equal the ratio of the medians shown",
]


def notes(checks, lines, document, runs):
    for line in lines:
        if line in NOTES:
            continue
        for run in runs:
            line = line.replace(run, "")
        checks.rest(masked(line, document), "note")


# Kinds whose text the terminal shortens, as in src/report/warnings.rs.
SHORT = {
    "cache-resident": "part of the weights stays in the CPU cache, so the share of memory bandwidth means little; measure a larger model",
    "outliers": "some repeats are far from the median; something else ran now and then",
}


def warnings(checks, lines, records):
    """`precision, precision: message`, as the records have it; the terminal groups them by kind."""
    seen = {(name(r), plain(message)) for r in records for message in r["warnings"]}
    seen |= {(r["precision"], plain(message)) for r in records for message in r["warnings"]}
    kinds = {(label, message.partition(": ")[0]) for label, message in seen}
    every = {r["precision"] for r in records}
    shown = 0
    for line in lines:
        more = re.fullmatch(r"… and (\d+) more \(`--warnings`\)", line)
        if more:
            checks.n += 1
            if int(more[1]) > len({kind for _, kind in kinds}) - shown:
                checks.fail(f"more warnings are counted than there are: `{line}`")
            continue
        labels, _, message = line.partition(": ")
        message, _, effects = message.partition(" (with it: ")
        effects = [kind for kind in effects.rstrip(")").split(", ") if kind]
        kind, _, text = message.partition(": ")
        shown += 1 + len(effects)
        is_text = SHORT.get(kind) == text or any(message == of_record for _, of_record in seen)
        for label in every if labels == "all" else labels.split(", "):
            checks.n += 1
            label = label.partition(" · ")[0]
            exact = (label, message) in seen and not effects
            if not exact and not (is_text and (label, kind) in kinds):
                checks.fail(f"warning of `{label}` is no record's: `{message}`")
        for effect in effects:
            checks.n += 1
            if effect not in {known for _, known in kinds}:
                checks.fail(f"no record has a warning `{effect}`, which stands in `{line}`")
