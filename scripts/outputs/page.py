"""The page: its tables, its charts with the numbers behind them, and the facts of each run."""
import re
from decimal import Decimal
from html.parser import HTMLParser

from record import GIB, NUMBER, Rows, at, metric, name, quality
from tables import table, verdicts
from words import masked, notes, title, warnings


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
