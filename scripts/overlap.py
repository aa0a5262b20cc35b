#!/usr/bin/env python3
"""Measures a model twice in a row, several times, and counts how often the two intervals of decode_tps overlap.

    scripts/overlap.py [--tries 10] [--model-id smollm2-135m] [--binary target/release/quantbench] [-- MORE OPTIONS OF QUANTBENCH]

Prints a line for each try and one for each precision at the end. Exits with 1 where a precision overlaps in fewer than nine tenths of the
tries, or where a run fails. Run it on a machine that does nothing else.
"""

import argparse
import json
import subprocess
import sys


def intervals(arguments):
    """By precision: both ends of the interval of decode_tps, and whether the record is tainted."""
    command = [arguments.binary, "--model-id", arguments.model_id, "--quiet", "--format", "json", *arguments.more]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = {}
    for record in json.loads(run.stdout)["records"]:
        summary = record["metrics"]["decode_tps"]
        found[record["precision"]] = (summary["ci95_low"], summary["ci95_high"], record["tainted"])
    return found


def overlap(first, second):
    """None where a run has no interval."""
    if None in first[:2] + second[:2]:
        return None
    return first[0] <= second[1] and second[0] <= first[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--model-id", default="smollm2-135m")
    parser.add_argument("--binary", default="target/release/quantbench")
    parser.add_argument("more", nargs="*")
    arguments = parser.parse_args()
    counts, n_tainted = {}, 0
    for number in range(1, arguments.tries + 1):
        first, second = intervals(arguments), intervals(arguments)
        words = []
        for precision in first:
            agrees = overlap(first[precision], second[precision])
            counts.setdefault(precision, []).append(bool(agrees))
            n_tainted += first[precision][2] + second[precision][2]
            low, high, _ = first[precision]
            words.append(f"{precision} {low}..{high} / {second[precision][0]}..{second[precision][1]}: {agrees}")
        print(f"try {number}: " + "; ".join(words), flush=True)
    for precision, agreed in counts.items():
        print(f"{precision}: {sum(agreed)} of {len(agreed)} overlap")
    if n_tainted:
        print(f"{n_tainted} records are tainted: the machine was not quiet")
    sys.exit(any(10 * sum(agreed) < 9 * len(agreed) for agreed in counts.values()))


if __name__ == "__main__":
    main()
