#!/bin/sh
# How often the gate flags two runs of the same build: pairs of separate processes, compared at -5 %.
#
#   scripts/aa.sh [PAIRS] [-- OPTIONS OF quantbench]
#
# Measures 2 runs a pair, one after the other, and prints a line for each pair and the counts. At most 2 of 40 may be flagged.
# QUANTBENCH names the binary (default: target/release/quantbench), GATES the gates.
set -eu

pairs=40
case "${1:-}" in
'' | --) ;;
*)
    pairs=$1
    shift
    ;;
esac
[ "${1:-}" = -- ] && shift
quantbench=${QUANTBENCH:-target/release/quantbench}
gates=${GATES:-decode_tps:-5%}
[ -x "$quantbench" ] || {
    echo "aa.sh: no binary \`$quantbench\`: cargo build --release, or set QUANTBENCH" >&2
    exit 2
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ok=0 unknown=0 flagged=0 pair=1
while [ "$pair" -le "$pairs" ]; do
    for side in a b; do
        "$quantbench" --quiet --output "$folder/$side.json" "$@" >/dev/null
    done
    code=0
    "$quantbench" compare "$folder/a.json" "$folder/b.json" --fail-on "$gates" --output "$folder/compared.json" \
        >"$folder/compared.txt" || code=$?
    case $code in
    0)
        # No regression is proven; the file says whether one is excluded.
        if grep -q '"verdict": "cannot_tell"' "$folder/compared.json"; then
            unknown=$((unknown + 1)) word="can't tell"
        else
            ok=$((ok + 1)) word=ok
        fi
        ;;
    3)
        flagged=$((flagged + 1)) word=flagged
        cat "$folder/compared.txt" >&2
        ;;
    *)
        echo "aa.sh: compare ended with $code" >&2
        exit "$code"
        ;;
    esac
    echo "pair $pair of $pairs: $word"
    pair=$((pair + 1))
done
echo "$pairs pairs at $gates: $ok ok, $unknown can't tell, $flagged flagged"
# One in twenty may be flagged by chance.
[ $((flagged * 20)) -le "$pairs" ]
