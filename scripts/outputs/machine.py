"""What programs read: CSV, JSON lines and the shapes of other tools."""
import csv
import io
import json
import re

from record import GIB, NUMBER, at, kl, lengths, metric, name, quality, same

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
                if not same(float(cell), float(value)):
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


SUMMARY = [metric("latency_s"), metric("latency_per_token_ms"), metric("output_tps"), *(at("memory", f"{key}_bytes", scale=GIB) for key in ("start", "end", "peak"))]


def of_summary_rows(checks, rows, document):
    checks.equal(len(rows), len(document["records"]), "rows")
    for (model, precision, *cells), r in zip(rows, document["records"]):
        checks.equal((model, precision), (r["model"]["id"], name(r)), "names")
        for cell, value in zip(cells, SUMMARY):
            shown = value(r) if r["status"] == "ok" else None
            if cell or shown is not None:
                checks.cell(cell, [shown], f"{precision}")


def of_summary(checks, text, document, changes):
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[2:]]
    of_summary_rows(checks, [row if len(row) == 8 else [*row[:2], *["-"] * 6] for row in rows], document)


def of_summary_csv(checks, text, document, changes):
    of_summary_rows(checks, list(csv.reader(io.StringIO(text)))[1:], document)
