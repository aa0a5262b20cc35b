"""The table for people and the Markdown one: rows against the records that they name, cells against what their columns mean."""
import re

from record import COLUMNS, MIB, WORDS, Rows, name, plain
from words import masked, notes, title, verdict, warnings


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


def pivot(checks, lines, document):
    """Cases by precision: each number is the decode speed of a record."""
    speeds = [r["metrics"]["decode_tps"]["median"] for r in document["records"] if "decode_tps" in r["metrics"]]
    speeds = [speed for speed in speeds if speed is not None]
    for line in lines:
        for cell in re.split(r"\s{2,}", line.strip())[1:]:
            number = re.fullmatch(r"(\d+(?:\.(\d+))?)\*?", cell)
            if number:
                printed = {f"{speed:.{len(number[2] or '')}f}" for speed in speeds}
                checks.equal(number[1] in printed, True, f"the speed `{cell}` of several cases")


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
        for p in after:
            if p.startswith("decode tokens/s  "):
                pivot(checks, p.split("\n")[1:], document)
        told = [line for p in after if not p.startswith("decode tokens/s  ") for line in p.split("\n")]
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


# Stands under a table of modules.
STAYS = "no precision quantizes the head or the embeddings: their rows say what that would cost"


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
                if line == STAYS:
                    continue
                checks.equal(line in {r["command"] for r in document["records"]}, True, f"the command `{line}`")
    checks.equal([name(r) for r in taker.left], [], "records that no row shows")
