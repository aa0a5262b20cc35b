#!/usr/bin/env bash
# Lists the measured figures of README.md and docs/ whose code changed since their commit.
#
#   scripts/stale-figures.sh [FILE...]     default: README.md docs/*.md
#
# A figure names its commit as "commit HASH" (any case). What decides a figure is the code that runs in the timed part: CODE below.
# Prints one line for each commit that is named: the place, the commit, and how many files changed. Exit code 0, stale or not; 2 where a
# commit is named that the history lacks.
set -euo pipefail
cd "$(dirname "$0")/.."

CODE=(src/kernels src/quant src/engine src/plan src/lower)

main() {
    local files=("$@") found place hash changed status=0
    [ ${#files[@]} -gt 0 ] || files=(README.md docs/*.md)
    [ "$(git rev-parse --is-shallow-repository)" = false ] || { echo "stale-figures: the history is shallow; fetch it whole" >&2; exit 2; }
    found=$(grep -noiE 'commit:? [0-9a-f]{7,40}\b' "${files[@]}" /dev/null || true)
    while IFS=: read -r file line text; do
        [ -n "$file" ] || continue
        place=$file:$line
        hash=$(grep -oE '[0-9a-f]{7,40}$' <<<"$text")
        if ! git cat-file -e "$hash^{commit}" 2>/dev/null; then
            # Another project's commits stand beside its name.
            sed -n "${line}p" "$file" | grep -q "its commit $hash" && continue
            echo "$place: commit $hash is not in the history" >&2
            status=2
            continue
        fi
        changed=$(git diff --name-only "$hash" HEAD -- "${CODE[@]}" | wc -l)
        if [ "$changed" -eq 0 ]; then
            echo "$place: commit $hash: current"
        else
            echo "$place: commit $hash: $changed files of ${CODE[*]} changed since"
        fi
    done <<<"$found"
    return $status
}

main "$@"
