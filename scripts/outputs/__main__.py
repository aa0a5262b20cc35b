"""Compares every output of a result number by number with its JSON.

usage: python3 scripts/outputs RESULT.json [PATH/TO/quantbench]

Each format is written from RESULT.json by `quantbench report`, and read again here without any of its code. Every number that stands in
an output is looked up in the JSON: it must be the JSON's value, rounded to the decimals that are printed. A number that belongs to nothing
is an error, and so is a dash where the JSON has a value. Needs the standard library alone.
"""
import json
import os
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True

from machine import of_csv, of_github, of_jsonl, of_llama_bench, of_summary, of_summary_csv
from page import of_page
from record import Checks, name
from tables import of_markdown, of_table

FORMATS = [
    (["table"], of_table), (["table", "--wide"], of_table), (["markdown"], of_markdown), (["markdown", "--wide"], of_markdown),
    (["html"], of_page), (["csv"], of_csv), (["jsonl"], of_jsonl), (["llama-bench"], of_llama_bench),
    (["github-action-benchmark"], of_github), (["summary"], of_summary), (["summary-csv"], of_summary_csv),
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
