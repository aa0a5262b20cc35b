"""The page: its tables, its charts with the numbers behind them, and the facts of each run."""
import re
from decimal import Decimal
from html.parser import HTMLParser

from record import COLUMNS, GIB, NUMBER, Rows, at, metric, name, quality
from tables import table, verdicts
from words import masked, notes, title, warnings


class Page(HTMLParser):
    """The page as a tree of [tag, attributes, children]; texts are strings."""

    VOID = {"meta", "link", "input", "rect", "line", "circle", "polygon", "polyline", "path", "br"}

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


def full_cells_of(row):
    """The same; a run that is shortened has its whole label as a title."""
    return [cell[1].get("title") or text_of(cell) for cell in row[2] if not isinstance(cell, str)]


def head_of(cell):
    small = "".join(text_of(small) for small in every(cell, "small"))
    return text_of(cell)[: len(text_of(cell)) - len(small)] if small else text_of(cell), small


def of_page(checks, text, document, changes):
    page, taker, overview = Page(text).root, Rows(document), Rows(document)
    for nav in every(page, "nav"):
        of_overview(checks, nav, overview)
        over_all(checks, nav, document)
    for article in every(page, "article"):
        grid = next(every(next(every(article, "div", "scroll")), "table"))
        lines = list(every(grid, "tr"))
        headers = [head_of(cell) for cell in every(lines[0], "th")]
        title_ = f"{text_of(next(every(article, 'h2')))} on {text_of(next(every(article, 'p', 'scope')))}"
        records, runs = table(checks, title_, headers, [full_cells_of(line) for line in lines[1:]], taker, changes, document)
        title(checks, title_.replace("`", ""), records, document)
        said = [text_of(p).replace("`", "").removesuffix(".") for p in every(article, "p", "verdict")]
        verdicts(checks, said, records, runs, document)
        for p in every(article, "p", "notes"):
            notes(checks, text_of(p).rstrip(".").split(". "), document, set(runs))
        for figure in every(article, "figure"):
            chart(checks, figure, records, runs)
        for section in every(article, "section"):
            if section[1].get("class") == "changes":
                changed(checks, section, records, runs, changes)
            elif section[1].get("class") == "written":
                written(checks, section, records)
            else:
                facts(checks, section, records, document)
    head = text_of(next(every(page, "header")))
    n_cases = len(list(every(page, "article")))
    for what in (f"{n_cases} case", f"{len(document['records'])} row", document["records"][0]["timestamp"].split("T")[0] if document["records"][0]["timestamp"] else ""):
        checks.equal(what in head, True, f"`{what}` in the head of the page")
        head = head.replace(what, "", 1)
    checks.rest(masked(head, document), "head of the page")
    foot = text_of(next(every(page, "footer"))).replace("95 % intervals", "").replace("230 bytes", "").replace("109 bytes", "")
    checks.rest(foot.replace("fp16", ""), "foot of the page")
    # Of a case with many runs the page shows the newest, and the trend all.
    if "; the trend shows all of them." not in text:
        checks.equal([name(r) for r in taker.left], [], "records that no row shows")


OVERVIEW = {
    ("decode", "tokens/s"): metric("decode_tps"),
    ("speed-up", "x fp16"): lambda r: COLUMNS["speed-up", "x fp16"](r)[0],
    ("peak", "GiB"): at("memory", "peak_bytes", scale=GIB),
    ("TTFT", "ms"): metric("ttft_ms"),
    ("prefill", "tokens/s"): metric("prefill_tps"),
    ("energy", "J/token"): metric("joules_per_token"),
    ("KL", "nats/token"): quality("kl_mean"),
}


def of_overview(checks, nav, taker):
    lines = list(every(next(every(nav, "table", "overview")), "tr"))
    headers = [head_of(cell) for cell in every(lines[0], "th")][2:]
    for line in lines[1:]:
        case, *cells = cells_of(line)
        r = taker.take(cells[0], case)
        if r is None:
            checks.fail(f"overview: `{cells[0]}` shows no record")
        elif r["status"] == "ok":
            for header, cell in zip(headers, cells[1:]):
                checks.cell(cell, [OVERVIEW[header](r)], f"overview, {header}")


def over_all(checks, nav, document):
    """Speed against memory of all rows: each is a record, and those on the Pareto line are those that no other beats at both."""
    known = [(name(r), metric("decode_tps")(r), at("memory", "peak_bytes", scale=GIB)(r)) for r in document["records"] if r["status"] == "ok"]
    for grid in every(nav, "table"):
        if "overview" in grid[1].get("class", ""):
            continue
        rows = [cells_of(line) for line in list(every(grid, "tr"))[1:]]
        spots = [(Decimal(row[2]), Decimal(row[3])) for row in rows]
        for row, (speed, memory) in zip(rows, spots):
            places = [len(text.partition(".")[2]) for text in row[2:4]]
            as_shown = {(label, f"{tps:.{places[0]}f}", f"{gib:.{places[1]}f}") for label, tps, gib in known if None not in (tps, gib)}
            checks.equal(tuple(row[1:4]) in as_shown, True, f"all cases, {row[0]}, {row[1]}")
            if len(row) > 4:
                beaten = any(s >= speed and m <= memory and (s, m) != (speed, memory) for s, m in spots)
                checks.equal(row[4], "no" if beaten else "yes", f"the Pareto line, {row[0]}, {row[1]}")


def changed(checks, section, records, runs, changes):
    """What a later run changed: base and new as their records have them."""
    base, new = text_of(next(every(section, "h3"))).split(" → ")
    label = ""
    for line in list(every(section, "tr"))[1:]:
        heads = list(every(line, "th"))
        label = text_of(heads[0]) if heads else label
        what, base_text, new_text, change = cells_of(line)[len(heads):][:4]
        unit = "".join(text_of(small) for small in every(line, "small"))
        value = OVERVIEW[what.removesuffix(unit), unit]
        pair = [next(r for r, other in zip(records, runs) if other == run and name(r) == label) for run in (base, new)]
        for text, r in zip((base_text, new_text), pair):
            checks.cell(text, [value(r)], f"changes, {label}, {what}")
        if what.startswith("decode"):
            checks.cell(change.replace(" %", ""), changes(*pair), f"changes, {label}, {what}")


def written(checks, section, records):
    """The generated texts, each under its precision."""
    for place in every(next(every(section, "div", "texts")), "div"):
        label, text = text_of(next(every(place, "h4"))), text_of(next(every(place, "p")))
        plain_ = lambda text: "".join(c for c in text or "" if c == "\n" or c.isprintable() or c > "\x9f")
        found = [r for r in records if label in (name(r), r["precision"]) and plain_(r["output"]["text"]) == text]
        checks.equal(len(found) > 0, True, f"the text of {label}")


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


def with_interval(key):
    return [metric(key), lambda r: [metric(key, end)(r) for end in ("ci95_low", "ci95_high")]]


def divergence_interval(r):
    mean, half = quality("kl_mean")(r), quality("kl_mean_half_width")(r)
    return [None] if mean is None or half is None else [mean - half, mean + half]


def repeats(r):
    imported = r["samples"].get("imported", {}).get("latency_per_token_ms")
    return sorted(imported or [ns / 1e6 / r["workload"]["n_gen"] for ns in r["samples"]["end_to_end_ns"]])


def middle(values):
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


# Of each chart, the columns of the numbers behind it.
CHARTS = {
    "latency": with_interval("latency_s"),
    "speed": with_interval("decode_tps"),
    "first-token": with_interval("ttft_ms"),
    "prompt-speed": with_interval("prefill_tps"),
    "energy": with_interval("joules_per_token"),
    "divergence": [quality("kl_mean"), divergence_interval],
    "divergence-by-size": [at("memory", "weights_bytes", scale=GIB), quality("kl_mean"), quality("kl_mean_half_width"), metric("decode_tps")],
    "peak-memory": [at("memory", "peak_bytes", scale=GIB)],
    "bandwidth": [at("bandwidth", "achieved_gb_s")],
    "trade": [metric("decode_tps"), lambda r: (r["memory"]["peak_bytes"] or r["memory"]["weights_bytes"]) / GIB],
    "latency-per-token": [lambda r: len(repeats(r)), lambda r: repeats(r)[0], lambda r: middle(repeats(r)), lambda r: repeats(r)[-1]],
    "step-latency": [lambda r: len(steps(r)), lambda r: steps(r)[0], *map(quantile, (0.5, 0.9, 0.95, 0.99)), lambda r: steps(r)[-1]],
    "memory-parts": [at("memory", "weights_bytes", scale=GIB), at("memory", "kv_cache_bytes", scale=GIB), at("memory", "scratch_bytes", scale=GIB), rest_of_peak],
}
# Whose texts are the rows' own numbers; the others have axes, whose marks are even steps.
INTERVALS = {"latency", "speed", "first-token", "prompt-speed", "energy", "divergence"}
BARS = INTERVALS | {"peak-memory", "bandwidth", "memory-parts"}
# Whose upright axis counts in equal factors.
LOGARITHMIC = {"divergence-by-size"}
OVER_TIME = {"memory-over-time", "clocks-over-time"}


def chart(checks, figure, records, runs):
    kind = figure[1]["class"].split()[0]
    if kind in OVER_TIME:
        return over_time(checks, figure, records, kind)
    if kind == "trend":
        return trend(checks, figure, records, runs)
    columns, labelled = CHARTS[kind], {}
    rows = [cells_of(line) for line in list(every(figure, "tr"))[1:]]
    left = [(r, run) for r, run in zip(records, runs) if r["status"] == "ok"]
    for row in rows:
        if row[0] == "read bandwidth":
            checks.number(row[1], max(r["bandwidth"]["read_gb_s"] or 0 for r in records if r["status"] == "ok"), f"{kind}, limit")
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
        shown = row[1] if len(row) < 3 or kind not in INTERVALS or row[2] == "-" else f"{row[1]} {row[2]}"
        if kind in BARS - {"memory-parts"}:
            checks.equal(f"{label} {shown}" in description and shown in texts, True, f"{kind}: `{label} {shown}` in the picture and in its words")
    total = {label: sum(Decimal(x) for x in row[1:]) for label, row in known.items()} if kind == "memory-parts" else {}
    for label, sum_ in total.items():
        said = re.search(rf"{re.escape(label)} ({NUMBER})", description)
        # Four parts, each rounded to half of its fourth decimal, and the sum rounded too.
        allowed = Decimal("0.0002") + Decimal("0.5") * Decimal(10) ** -len(said.group(1).partition(".")[2])
        checks.equal(abs(Decimal(said.group(1)) - sum_) <= allowed and said.group(1) in texts, True, f"{kind}: {said.group(1)} for {label}")
    # Marks of the upright axis end at it, those of the level one have their middle at theirs.
    for anchor in () if kind in BARS else ("middle",) if kind in LOGARITHMIC else ("end", "middle"):
        of_axis = [text_of(text) for text in every(svg, "text") if text[1].get("text-anchor") == anchor]
        marks_are_even(checks, kind, [text for text in of_axis if re.fullmatch(NUMBER, text)])


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


def trend(checks, figure, records, runs):
    for line in list(every(figure, "tr"))[1:]:
        run, label, tps, interval = cells_of(line)
        r = next((r for r, other in zip(records, runs) if other == run and name(r) == label), None)
        if r is None:
            checks.fail(f"trend: `{run}`, `{label}` is no record")
            continue
        for text, column in zip((tps, interval), with_interval("decode_tps")):
            value = column(r)
            checks.cell(text, value if isinstance(value, list) else [value], f"trend, {run}, {label}")


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
