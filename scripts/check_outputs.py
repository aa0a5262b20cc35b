#!/usr/bin/env python3
"""Compares every output of a result number by number with its JSON.

usage: check_outputs.py RESULT.json [PATH/TO/quantbench]

Each format is written from RESULT.json by `quantbench report`, and read again here without any of its code. Every number that stands in
an output is looked up in the JSON: it must be the JSON's value, rounded to the decimals that are printed. A number that belongs to nothing
is an error, and so is a dash where the JSON has a value. Needs the standard library alone.
"""
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from decimal import Decimal
from html.parser import HTMLParser

GIB, MIB = 1 << 30, 1 << 20
NUMBER = r"-?\d+(?:\.\d+)?"
OWN = "quantbench"


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
        if seen != expected:
            self.fail(f"{what}: {seen!r} is shown, and the JSON has {expected!r}")

    def rest(self, text, what):
        """Nothing that is left over holds a digit."""
        for left in re.findall(r"\S*\d\S*", text):
            self.fail(f"{what}: `{left}` belongs to nothing, in `{text.strip()[:160]}`")


# What a record says.


def metric(key, what="median"):
    return lambda r: (r["metrics"].get(key) or {}).get(what)


def with_interval(*values):
    """The number alone, or with both ends."""
    return [values[0]] if values[1] is None or values[2] is None else list(values)


def interval(key):
    return lambda r: with_interval(*(metric(key, end)(r) for end in ("median", "ci95_low", "ci95_high")))


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


def of_seed(key):
    return lambda r: [metric(key)(r) if r["protocol"]["method"] == "seed" else None]


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
    ("peak", "GiB"): one(at("memory", "peak_bytes", scale=GIB)),
    ("weights", "GiB"): one(at("memory", "weights_bytes", scale=GIB)),
    ("TTFT", "ms"): one(metric("ttft_ms")),
    ("prefill", "tokens/s"): when("ttft_ms", "alone", interval("prefill_tps")),
    ("output", "tokens/s"): when("decode_tps", "alone", interval("output_tps")),
    ("KL", "nats/token"): kl,
    ("throughput", "one cold run"): of_seed("output_tps"),
    ("latency", "s, cold"): of_seed("latency_s"),
    ("per token", "ms, cold"): of_seed("latency_per_token_ms"),
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


# Free text.


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

    def saved(match):
        numbers(match, [gib(fp16) - gib(r()), gib(fp16)], "peak memory")

    def taken(match):
        numbers(match, [gib(r()) - gib(fp16), gib(fp16)], "peak memory")

    n, pair = f"({NUMBER})", rf"(?: \[({NUMBER}), ({NUMBER})\])?"
    ends = lambda: [quality("perplexity_ratio_ci95_low")(r()), quality("perplexity_ratio_ci95_high")(r())]
    rules = [
        (rf"{n}x fp16's perplexity{pair}", lambda m: numbers(m, perplexity_ratio(r()), "perplexity")),
        (rf"perplexity differs from fp16's, can't tell, {n}x to {n}x", lambda m: numbers(m, ends(), "perplexity")),
        (rf"can't tell, {n}x to {n}x", lambda m: numbers(m, between(r()), "speed-up")),
        (rf"no difference within 5 %, {n}x to {n}x fp16", lambda m: numbers(m, between(r()), "speed-up")),
        (rf"{n}x fp16{pair}", lambda m: numbers(m, [*ratio("median")(r()), *between(r())], "speed-up")),
        (rf"too few repeats \({n}\)", lambda m: numbers(m, [metric("decode_tps", "n")(r())], "repeats")),
        (rf"{n} tokens/s{pair}", speed),
        (rf"at {n} % of the read bandwidth", lambda m: numbers(m, percent(at("bandwidth", "mbu"))(r()), "bandwidth")),
        (rf"saves {n} of {n} GiB peak memory", saved),
        (rf"takes {n} GiB more peak memory than fp16's {n}", taken),
        (rf"on {n} % of next tokens", lambda m: numbers(m, percent(quality("top1_agreement"))(r()), "top-1")),
        (rf"into {n} GiB", lambda m: numbers(m, [at("card_bytes", scale=GIB)(records[0])], "card")),
        (rf"batch {n}, these lengths", lambda m: numbers(m, [records[0]["workload"]["batch_size"]], "batch")),
        (r"1 new token takes no decode step", lambda m: checks.equal(records[0]["workload"]["n_gen"], 1, "verdict, new tokens")),
        (r"the prompt is processed at", lambda m: state.update(speed="prefill_tps")),
        (r"generated tokens over all of the time", lambda m: state.update(speed="output_tps")),
        (r"(?:than|from|with) fp16(?:'s)?", lambda m: None),
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
    "speed-ups are medians of paired repeats, so they need not equal the ratio of the medians shown",
]


def notes(checks, lines, document, runs):
    for line in lines:
        if line in NOTES:
            continue
        for run in runs:
            line = line.replace(run, "")
        checks.rest(masked(line, document), "note")


def warnings(checks, lines, records):
    """`precision, precision: message`, as the records have it."""
    seen = {(name(r), plain(message)) for r in records for message in r["warnings"]}
    seen |= {(r["precision"], plain(message)) for r in records for message in r["warnings"]}
    for line in lines:
        labels, _, message = line.partition(": ")
        for label in labels.split(", "):
            checks.n += 1
            if (label.partition(" · ")[0], message) not in seen:
                checks.fail(f"warning of `{label}` is no record's: `{message}`")


# Tables.


def table(checks, title_, headers, rows, taker, changes, document):
    """Rows as lists of texts against the records that they name; gives the records and their runs."""
    records, runs = [], []
    for row in rows:
        r = taker.take(row[0], title_)
        if r is None:
            checks.fail(f"row `{row[0]}` shows no record")
            continue
        checks.equal(row[0].endswith("*"), r.get("tainted", False), f"{row[0]}, asterisk")
        run = row[1] if headers[1][0] == "run" else ""
        records.append(r)
        runs.append(run)
        if r["status"] != "ok":
            reason = f"{r['status']}: {plain(r['reason'])}" if r["reason"] else r["status"]
            checks.equal([cell for cell in row[1:] if cell and cell != run], [reason], f"{row[0]}, status")
            continue
        for header, text in zip(headers[1:], row[1:]):
            what = f"{row[0]}, {' '.join(header)}"
            if header == ("change", "of decode"):
                values = changes(records[0], r) if run != runs[0] else None
                checks.cell(text.replace(" %", ""), values, what)
            elif header in COLUMNS:
                checks.cell(text, COLUMNS[header](r), what)
            elif header == ("run", ""):
                checks.rest(masked(re.sub(r"^#\d+", "", text), document), what)
            elif header not in WORDS:
                checks.fail(f"unknown column {header}")
    return records, runs


def by_run(records, runs):
    """Records of each run, in order; a case of one run has the name ''."""
    groups = {}
    for r, run in zip(records, runs):
        groups.setdefault(run, []).append(r)
    return groups


def verdicts(checks, lines, records, runs, document):
    groups = by_run(records, runs)
    if len(lines) != len(groups):
        return checks.fail(f"{len(lines)} verdicts for {len(groups)} runs")
    for line, (run, group) in zip(lines, groups.items()):
        for known in ([run] if run else [f"{group[0]['timestamp']}"]):
            line = re.sub(rf"^(?:\S+, )?{re.escape(known)}: ", "", line)
        verdict(checks, line, group, document)


def modules(checks, label, lines, records):
    """One table of parts of a model."""
    r = next((r for r in records if name(r) == label or r["precision"] == label), records[0])
    for module in r["quality"]["modules"]:
        cells = next((re.split(r"\s{2,}", line.strip()) for line in lines if line.startswith(module["module"] + "  ")), None)
        if cells is None:
            checks.fail(f"{label} by module lacks {module['module']}")
            continue
        mean, half = module["kl_mean"], module["kl_mean_half_width"]
        checks.cell(cells[1], [mean] if half is None else [mean, mean - half, mean + half], "KL by module")
        checks.cell(cells[2], [None if module["top1_agreement"] is None else 100 * module["top1_agreement"]], "top-1 by module")
        checks.cell(cells[3], [module["saved_bytes"] / MIB], "saved by module")
        if len(cells) > 4:
            share = module["outlier_share"]
            checks.cell(cells[4], [None if share is None else 100 * share], "outliers by module")


def split_modules(text):
    """The text without its tables of modules, and these."""
    found = re.findall(r"^(.+) by module\n\n((?:.+\n)+)\n(.+)\n?", text, flags=re.M)
    return re.sub(r"^.+ by module\n\n(?:.+\n)+\n.+\n?", "", text, flags=re.M), found


def of_table(checks, text, document, changes):
    taker = Rows(document)
    for block in re.split(r"\n\n(?=\S.*: .*(?:prompt \+|quality over).*\n)", "\n\n" + text)[1:]:
        block, parts = split_modules(block)
        head, _, body = block.partition("\n\n")
        title_, *said = head.split("\n")
        grid, *after = [p for p in body.strip("\n").split("\n\n") if p]
        lines = grid.split("\n")
        headers = heads(lines[0], lines[1])
        rows = [row_cells(line, headers) for line in lines[2:]]
        records, runs = table(checks, title_, headers, rows, taker, changes, document)
        title(checks, title_, records, document)
        verdicts(checks, said, records, runs, document)
        for label, rows_, _ in parts:
            modules(checks, label, rows_.split("\n"), records)
        told = [line for p in after for line in p.split("\n")]
        warnings(checks, [line[len("warning: "):] for line in told if line.startswith("warning: ")], records)
        notes(checks, [line for line in told if not line.startswith("warning: ")], document, set(runs))
    checks.equal([name(r) for r in taker.left], [], "records that no row shows")


def heads(names, units):
    """Name and unit of each column: both end where the column ends, but for the first one."""
    words = lambda line: [(match.group(), match.end()) for match in re.finditer(r"\S(?: ?\S)*", line)]
    units = {end: text for text, end in words(units)}
    return [(text, units.get(end, "") if i else "") for i, (text, end) in enumerate(words(names))]


def row_cells(line, headers):
    """Cells of a row, or its label and the reason that stands over all others."""
    words = re.split(r"\s{2,}", line.strip())
    if len(words) == len(headers):
        return words
    label, rest = words[0], "  ".join(words[1:])
    return [label, *rest.split(": ", 1)] if headers[1][0] == "run" else [label, rest]


def unescape(text):
    return re.sub(r"\\(.)", r"\1", text)


def of_markdown(checks, text, document, changes):
    taker = Rows(document)
    for block in re.split(r"^## ", text, flags=re.M)[1:]:
        code = re.findall(r"^(`{3,})sh\n(.*?)\n\1$", block, flags=re.M | re.S)
        block = re.sub(r"^(`{3,})sh\n.*?\n\1\n?", "", block, flags=re.M | re.S)
        lines = [line for line in block.split("\n") if line]
        title_, grid = unescape(lines[0]), [line for line in lines if line.startswith("| ")]
        cells = [[unescape(c.strip()) for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in grid]
        headers = [tuple(head.split(", ", 1)) if ", " in head else (head, "") for head in cells[0]]
        rows = [[c for i, c in enumerate(row) if c or i < 1] for row in cells[2:]]
        records, runs = table(checks, title_, headers, rows, taker, changes, document)
        title(checks, title_, records, document)
        first, last = lines.index(grid[0]), lines.index(grid[-1])
        verdicts(checks, [unescape(line) for line in lines[1:first]], records, runs, document)
        told = lines[last + 1:]
        warnings(checks, [unescape(line[2:]) for line in told if line.startswith("- ")], records)
        said = [unescape(line) for line in told if not line.startswith(("- ", "Warnings:", "To repeat it:"))]
        notes(checks, [note for line in said for note in line.rstrip(".").split(". ")], document, set(runs))
        for _, body in code:
            rest, parts = split_modules(body.strip("\n") + "\n")
            for label, rows_, _ in parts:
                modules(checks, label, rows_.split("\n"), records)
            for line in filter(None, rest.split("\n")):
                checks.equal(line in {r["command"] for r in document["records"]}, True, f"the command `{line}`")
    checks.equal([name(r) for r in taker.left], [], "records that no row shows")


# The page.


class Page(HTMLParser):
    """The page as a tree of [tag, attributes, children]; texts are strings."""

    VOID = {"meta", "link", "rect", "line", "circle", "polygon", "polyline", "path", "br"}

    def __init__(self, text):
        super().__init__()
        self.root = ["page", {}, []]
        self.open = [self.root]
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        node = [tag, dict(attributes), []]
        self.open[-1][2].append(node)
        if tag not in self.VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1][2].append([tag, dict(attributes), []])

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        self.open[-1][2].append(data)


def text_of(node):
    return node if isinstance(node, str) else "".join(text_of(child) for child in node[2])


def every(node, tag, of_class=None):
    for child in node[2]:
        if not isinstance(child, str):
            if child[0] == tag and (of_class is None or of_class in child[1].get("class", "").split()):
                yield child
            else:
                yield from every(child, tag, of_class)


def cells_of(row):
    return [text_of(cell) for cell in row[2] if not isinstance(cell, str)]


def head_of(cell):
    small = "".join(text_of(small) for small in every(cell, "small"))
    return text_of(cell)[: len(text_of(cell)) - len(small)] if small else text_of(cell), small


def of_page(checks, text, document, changes):
    page, taker, overview = Page(text).root, Rows(document), Rows(document)
    for nav in every(page, "nav"):
        of_overview(checks, nav, overview)
    for article in every(page, "article"):
        grid = next(every(next(every(article, "div", "scroll")), "table"))
        lines = list(every(grid, "tr"))
        headers = [head_of(cell) for cell in every(lines[0], "th")]
        title_ = f"{text_of(next(every(article, 'h2')))} on {text_of(next(every(article, 'p', 'scope')))}"
        records, runs = table(checks, title_, headers, [cells_of(line) for line in lines[1:]], taker, changes, document)
        title(checks, title_.replace("`", ""), records, document)
        said = [text_of(p).replace("`", "").removesuffix(".") for p in every(article, "p", "verdict")]
        verdicts(checks, said, records, runs, document)
        for p in every(article, "p", "notes"):
            notes(checks, text_of(p).rstrip(".").split(". "), document, set(runs))
        for figure in every(article, "figure"):
            chart(checks, figure, records, runs)
        for section in every(article, "section"):
            facts(checks, section, records, document)
    head = text_of(next(every(page, "header")))
    n_cases = len(list(every(page, "article")))
    for what in (f"{n_cases} case", f"{len(document['records'])} row", document["records"][0]["timestamp"].split("T")[0] if document["records"][0]["timestamp"] else ""):
        checks.equal(what in head, True, f"`{what}` in the head of the page")
        head = head.replace(what, "", 1)
    checks.rest(masked(head, document), "head of the page")
    foot = text_of(next(every(page, "footer"))).replace("95 % intervals", "").replace("230 bytes", "").replace("109 bytes", "")
    checks.rest(foot.replace("fp16", ""), "foot of the page")
    checks.equal([name(r) for r in taker.left], [], "records that no row shows")


OVERVIEW = {
    ("decode", "tokens/s"): metric("decode_tps"),
    ("peak", "GiB"): at("memory", "peak_bytes", scale=GIB),
    ("TTFT", "ms"): metric("ttft_ms"),
    ("KL", "nats/token"): quality("kl_mean"),
}


def of_overview(checks, nav, taker):
    lines, case = list(every(nav, "tr")), ""
    headers = [head_of(cell) for cell in every(lines[0], "th")][2:]
    for line in lines[1:]:
        group = [cell for cell in every(line, "th")]
        case = text_of(group[0]) if group else case
        cells = cells_of(line)[len(group):]
        r = taker.take(cells[0], case)
        if r is None:
            checks.fail(f"overview: `{cells[0]}` shows no record")
        elif r["status"] == "ok":
            for header, cell in zip(headers, cells[1:]):
                checks.cell(cell, [OVERVIEW[header](r)], f"overview, {header}")


def steps(r):
    return sorted(ns / 1e6 for repeat in r["samples"]["decode_step_ns"] for ns in repeat)


def quantile(q):
    def value(r):
        found = steps(r)
        place = q * (len(found) - 1)
        low, high = found[int(place)], found[min(int(place) + 1, len(found) - 1)]
        return low + (high - low) * (place - int(place))

    return value


def rest_of_peak(r):
    m = r["memory"]
    return max(0, (m["peak_bytes"] or 0) - m["weights_bytes"] - m["kv_cache_bytes"] - (m["scratch_bytes"] or 0)) / GIB


# Of each chart, the columns of the numbers behind it.
CHARTS = {
    "latency": [metric("latency_s"), lambda r: [metric("latency_s", end)(r) for end in ("ci95_low", "ci95_high")]],
    "speed": [metric("decode_tps"), lambda r: [metric("decode_tps", end)(r) for end in ("ci95_low", "ci95_high")]],
    "peak-memory": [at("memory", "peak_bytes", scale=GIB)],
    "bandwidth": [at("bandwidth", "achieved_gb_s")],
    "trade": [metric("decode_tps"), lambda r: (r["memory"]["peak_bytes"] or r["memory"]["weights_bytes"]) / GIB, lambda r: None if quality("kl_mean")(r) is None else max(0, quality("kl_mean")(r))],
    "step-latency": [lambda r: len(steps(r)), lambda r: steps(r)[0], *map(quantile, (0.5, 0.9, 0.95, 0.99)), lambda r: steps(r)[-1]],
    "memory-parts": [at("memory", "weights_bytes", scale=GIB), at("memory", "kv_cache_bytes", scale=GIB), at("memory", "scratch_bytes", scale=GIB), rest_of_peak],
}
# Whose texts are the rows' own numbers; the others have axes, whose marks are even steps.
BARS = {"latency", "speed", "peak-memory", "bandwidth", "memory-parts"}
OVER_TIME = {"memory-over-time", "clocks-over-time"}


def chart(checks, figure, records, runs):
    kind = figure[1]["class"].split()[0]
    if kind in OVER_TIME:
        return over_time(checks, figure, records, kind)
    columns, labelled = CHARTS[kind], {}
    rows = [cells_of(line) for line in list(every(figure, "tr"))[1:]]
    left = [(r, run) for r, run in zip(records, runs) if r["status"] == "ok"]
    for row in rows:
        if row[0] == "read bandwidth":
            checks.number(row[1], max(r["bandwidth"]["read_gb_s"] for r, _ in left if r["bandwidth"]["read_gb_s"]), f"{kind}, limit")
            continue
        found = [(r, run) for r, run in left if row[0].partition(" · ")[0] in (name(r), r["precision"])]
        if not found:
            checks.fail(f"{kind}: `{row[0]}` is no record")
            continue
        # Precisions of several runs stand in the order of the records.
        r = found[0][0] if row[0] not in labelled else None
        labelled[row[0]] = (r, row)
        if r is not None and " · " in row[0]:
            left = [(other, run) for other, run in left if other is not r]
        for text, column in zip(row[1:], columns):
            value = column(r)
            checks.cell(text, value if isinstance(value, list) else [value], f"{kind}, {row[0]}")
    svg = next(every(figure, "svg"))
    texts = [text_of(text).strip() for text in every(svg, "text")]
    description = text_of(next(every(svg, "desc")))
    known = {label: row for label, (_, row) in labelled.items()}
    for label, row in known.items():
        shown = row[1] if len(row) < 3 or kind not in ("latency", "speed") or row[2] == "-" else f"{row[1]} {row[2]}"
        if kind in BARS - {"memory-parts"}:
            checks.equal(f"{label} {shown}" in description and shown in texts, True, f"{kind}: `{label} {shown}` in the picture and in its words")
    total = {label: sum(Decimal(x) for x in row[1:]) for label, row in known.items()} if kind == "memory-parts" else {}
    for label, sum_ in total.items():
        said = re.search(rf"{re.escape(label)} ({NUMBER})", description)
        # Four parts, each rounded to half of its fourth decimal, and the sum rounded too.
        allowed = Decimal("0.0002") + Decimal("0.5") * Decimal(10) ** -len(said.group(1).partition(".")[2])
        checks.equal(abs(Decimal(said.group(1)) - sum_) <= allowed and said.group(1) in texts, True, f"{kind}: {said.group(1)} for {label}")
    marks_are_even(checks, kind, [text for text in texts if re.fullmatch(NUMBER, text)] if kind not in BARS else [])


def marks_are_even(checks, kind, marks):
    """Axes count in even steps from mark to mark; what stands among them is no value of a record."""
    series, current = [], []
    for mark in marks:
        if current and Decimal(mark) <= Decimal(current[-1]):
            series.append(current)
            current = []
        current.append(mark)
    for axis in [*series, current]:
        gaps = {Decimal(b) - Decimal(a) for a, b in zip(axis, axis[1:])}
        unit = Decimal(10) ** -max((len(mark.partition(".")[2]) for mark in axis), default=0)
        checks.equal(len(gaps) == 0 or max(gaps) - min(gaps) <= unit, True, f"{kind}: marks {axis}")


def over_time(checks, figure, records, kind):
    for line in list(every(figure, "tr"))[1:]:
        label, n, low, middle, high = cells_of(line)
        values = [Decimal(value) for value in (low, middle, high)]
        checks.equal(int(n) > 0 and values == sorted(values), True, f"{kind}, {label}")
        r = next((r for r in records if name(r) == label.partition(" · ")[0]), None)
        checks.equal(r is not None and bool(r.get("series")), True, f"{kind}, {label}")


def facts(checks, section, records, document):
    head = text_of(next(every(section, "h3")))
    if head == "Warnings":
        return warnings(checks, [text_of(li) for li in every(section, "li")], [dict(r, warnings=[w.replace("`", "") for w in r["warnings"]]) for r in records])
    if head == "To repeat it":
        for line in text_of(next(every(section, "code"))).split("\n"):
            checks.equal(line in {r["command"] for r in records}, True, f"the command `{line}`")
        return None
    checks.rest(masked(re.sub(r"#\d+", "", head), document), "head of a section")
    words = [text_of(node) for node in every(section, "dt")]
    for word, text in zip(words, (text_of(node) for node in every(section, "dd"))):
        found = [r for r in records if r["status"] == "ok"] or records
        if word == "threads":
            checks.equal(text in {str(r["environment"]["threads"]) for r in records}, True, word)
        elif word == "read bandwidth":
            known = [r["bandwidth"]["read_gb_s"] for r in records if r["bandwidth"]["read_gb_s"]]
            printed = re.match(NUMBER, text).group()
            checks.equal(any(round(x, 1) == float(printed) for x in known), True, f"{word} {printed}")
        elif word == "repeats":
            numbers = {r["protocol"]["n_repeats"] for r in found} | {r["protocol"]["n_warmup"] for r in found}
            for printed in re.findall(rf"(?<![\w.]){NUMBER}(?!\w)", masked(text, document)):
                checks.equal(int(printed) in numbers, True, f"{word} {printed}")
        elif word == "weights":
            seeds = {f"seed {r['weights']['seed']}" for r in records}
            for seed in seeds:
                text = text.replace(seed, "")
            checks.rest(masked(text, document), word)
        else:
            checks.rest(masked(text, document), word)
    return None


# Machine formats.

# CSV's columns that are no metric of `metrics`, by their place in the record.
CSV = dict(
    status="status", reason="reason", tainted="tainted", precision="precision", model_id="model.id", model_revision="model.revision",
    architecture="model.architecture", parameters="model.parameters", weights_source="weights.source", weights_dtype="weights.dtype",
    weights_seed="weights.seed", weights_hash="weights.hash", fp16_overflow="weights.fp16_overflow", int8_threshold="int8.threshold",
    device_kind="device.kind", device_name="device.name", n_prompt="workload.n_prompt", n_gen="workload.n_gen", n_depth="workload.n_depth",
    n_image="workload.n_image", batch_size="workload.batch_size", keep_fp16="keep_fp16", n_repeats="protocol.n_repeats",
    repeats_ended="protocol.ended", order="protocol.order", interval="protocol.interval", method="protocol.method",
    speedup_vs_fp16="ratio_to_fp16.median", speedup_vs_fp16_ci95_low="ratio_to_fp16.ci95_low", speedup_vs_fp16_ci95_high="ratio_to_fp16.ci95_high",
    bytes_ratio="ratio_to_fp16.by_bytes", speedup_paired="ratio_to_fp16.paired", outlier_columns_mean="int8.outlier_columns_mean",
    quality_path="quality.path", quality_text="quality.text", quality_tokens="quality.n_tokens", build_profile="environment.build_profile",
    engine="engine.name", engine_version="engine.version", engine_commit="engine.commit", timestamp="timestamp", command="command",
    card_bytes="card_bytes", warnings="warnings",
)
CSV.update({key: f"environment.{key}" for key in ("cpu", "isa", "threads", "os", "gpu", "driver", "cuda")})
PLACES = ("metrics.{}.median", "bandwidth.{}", "memory.{}", "quality.{}")


def csv_value(r, column, columns):
    if column in ("kl_mean_ci95_low", "kl_mean_ci95_high"):
        values = kl(r)
        return values[1 if column.endswith("low") else 2] if len(values) == 3 else None
    place = CSV.get(column)
    if place is None and column.rpartition("_ci95_")[0] in r["metrics"]:
        key, _, end = column.rpartition("_ci95_")
        place = f"metrics.{key}.ci95_{end}"
    if place is None:
        found = [p.format(column) for p in PLACES if at(*p.format(column).split("."))(r) is not None]
        place = found[0] if found else PLACES[0].format(column)
    return at(*place.split("."))(r)


def of_csv(checks, text, document, changes):
    rows = list(csv.DictReader(io.StringIO(text)))
    checks.equal(len(rows), len(document["records"]), "rows")
    for row, r in zip(rows, document["records"]):
        for column, cell in row.items():
            value = csv_value(r, column, row)
            what = f"{r['precision']}, {column}"
            if isinstance(value, (int, float)) and not isinstance(value, bool) and cell:
                checks.n += 1
                if float(cell) != float(value):
                    checks.fail(f"{what}: `{cell}` is shown, and the JSON has {value}")
            else:
                shown = {True: "true", False: "false", None: ""}.get(value if not isinstance(value, list) else 0, value)
                checks.equal(cell, "; ".join(value) if isinstance(value, list) else shown, what)
        for key in r["metrics"]:
            checks.equal(key in row, True, f"a column `{key}`")


def of_jsonl(checks, text, document, changes):
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        checks.equal(line.pop("schema_version"), document["schema_version"], "schema_version")
    checks.equal(lines, document["records"], "records")
    checks.n += len(re.findall(NUMBER, text))


def mean(values):
    return sum(values) / len(values)


def deviation(values):
    return (sum((x - mean(values)) ** 2 for x in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else 0.0


def near(seen, expected):
    # Sums of the same numbers in another order.
    return abs(seen - expected) <= 1e-9 * max(abs(expected), abs(seen)) + 1e-9


def of_llama_bench(checks, text, document, changes):
    rows = [json.loads(line) for line in text.splitlines()]
    expected = []
    for r in (r for r in document["records"] if r["status"] == "ok"):
        s, w = r["samples"], r["workload"]
        n_prompt, decode = w["n_prompt"] + w["n_image"], [e - p for e, p in zip(s["end_to_end_ns"], s["prefill_ns"])]
        tests = [(n_prompt, 0, w["n_depth"], s["prefill_ns"]), (0, w["n_gen"] - 1, w["n_depth"] + n_prompt, decode)]
        expected += [(r, *test) for test in tests if test[0] + test[1] > 0 and test[3]]
    checks.equal(len(rows), len(expected), "rows")
    for row, (r, n_prompt, n_gen, n_depth, ns) in zip(rows, expected):
        own = row["quantbench"]
        tokens_per_s = [(n_prompt + n_gen) * 1e9 / x for x in ns]
        facts_ = dict(
            n_prompt=n_prompt, n_gen=n_gen, n_depth=n_depth, samples_ns=ns, model_filename=r["model"]["id"], model_size=r["memory"]["weights_bytes"],
            model_n_params=r["model"]["parameters"], n_threads=r["environment"]["threads"], test_time=r["timestamp"],
            build_commit=r["engine"]["commit"],
        )
        for key, value in facts_.items():
            checks.equal(row[key] or None, value or None, key)
        checks.equal([own["precision"], own["engine"], own["version"]], [r["precision"], r["engine"]["name"], r["engine"]["version"]], "identity")
        for key, value in dict(avg_ts=mean(tokens_per_s), stddev_ts=deviation(tokens_per_s)).items():
            checks.equal(near(row[key], value), True, f"{key}: {row[key]} for {value}")
        for key, value in dict(avg_ns=mean(ns), stddev_ns=deviation(ns)).items():
            checks.number(str(row[key]), value, key)
        checks.equal(all(near(a, b) for a, b in zip(row["samples_ts"], tokens_per_s)), True, "samples_ts")


GITHUB = dict(
    tpot_ms=metric("tpot_ms"), ttft_ms=metric("ttft_ms"), peak_bytes=at("memory", "peak_bytes"), weights_bytes=at("memory", "weights_bytes"),
    kl_mean=quality("kl_mean"),
)


def of_github(checks, text, document, changes):
    entries = json.loads(text)
    ok = [r for r in document["records"] if r["status"] == "ok"]
    expected = [(r, key, value(r)) for r in ok for key, value in GITHUB.items() if value(r) is not None]
    checks.equal(len(entries), len(expected), "entries")
    for entry, (r, key, value) in zip(entries, expected):
        checks.equal(entry["name"], f"{r['model']['id']} {name(r)} {key} ({lengths(r)})", "name")
        checks.equal(entry["value"], value, key)
        ends = [metric(key, end)(r) for end in ("ci95_low", "ci95_high")]
        if "range" in entry:
            checks.cell(entry["range"], ends, f"{key}, range")
        else:
            checks.equal(None in ends, True, f"{key} without a range")


SEED = [metric("latency_s"), metric("latency_per_token_ms"), metric("output_tps"), *(at("memory", f"{key}_bytes", scale=GIB) for key in ("start", "end", "peak"))]


def of_seed_rows(checks, rows, document):
    checks.equal(len(rows), len(document["records"]), "rows")
    for (model, precision, *cells), r in zip(rows, document["records"]):
        checks.equal((model, precision), (r["model"]["id"], name(r)), "names")
        for cell, value in zip(cells, SEED):
            shown = value(r) if r["status"] == "ok" else None
            if cell or shown is not None:
                checks.cell(cell, [shown], f"{precision}")


def of_seed(checks, text, document, changes):
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[2:]]
    of_seed_rows(checks, [row if len(row) == 8 else [*row[:2], *["-"] * 6] for row in rows], document)


def of_seed_csv(checks, text, document, changes):
    of_seed_rows(checks, list(csv.reader(io.StringIO(text)))[1:], document)


FORMATS = [
    (["table"], of_table), (["table", "--wide"], of_table), (["markdown"], of_markdown), (["markdown", "--wide"], of_markdown),
    (["html"], of_page), (["csv"], of_csv), (["jsonl"], of_jsonl), (["llama-bench"], of_llama_bench),
    (["github-action-benchmark"], of_github), (["seed"], of_seed), (["seed-csv"], of_seed_csv),
]


def differences(program, document):
    """Change of the decode speed from one record to another in %, by `quantbench compare`."""
    def of(base, new):
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, side) for side in ("base.json", "new.json")]
            for path, r in zip(paths, (base, new)):
                with open(path, "w") as file:
                    json.dump(dict(document, records=[r]), file)
            command = [program, "compare", *paths, "--fail-on", "decode_tps:-5%", "--allow-different-machine", "--format", "json"]
            check = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)["checks"][0]
        values = [check[key] for key in ("change", "ci95_low", "ci95_high")]
        return [100 * value for value in values if value is not None]

    def change(first, r):
        base = next(b for b in document["records"] if name(b) == name(r) and b["model"] == first["model"] and b["workload"] == first["workload"])
        return of(base, r) if base["status"] == "ok" else None

    return change


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__.split("\n\n")[1])
    path, program = sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "quantbench"
    with open(path) as file:
        document = json.load(file)
    failed = 0
    for words, check in FORMATS:
        checks = Checks()
        checks.where = " ".join(words)
        written = subprocess.run([program, "report", path, "--format", *words], stdout=subprocess.PIPE, text=True, check=True)
        check(checks, written.stdout, document, differences(program, document))
        print(f"{checks.where}: {checks.n} compared, {len(checks.errors)} wrong")
        for error in checks.errors:
            print(f"  {error}")
        failed += len(checks.errors)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
