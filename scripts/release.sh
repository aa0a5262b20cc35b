#!/usr/bin/env bash
# One stripped Linux binary with CUDA that starts on every machine of this architecture, with or without a GPU, a driver or CUDA's
# libraries: it opens them where it finds them (docs/offline.md).
#
#   scripts/release.sh [DIR]      writes DIR/quantbench-VERSION-TARGET and its SHA-256 (default: dist), then lists the figures of README.md
#                                 and docs/ whose kernels changed since they were measured
#
# Uses the nvcc on PATH, else the toolkit that scripts/cuda-toolkit.sh puts into QUANTBENCH_CI_CACHE/cuda-13.0. Builds into
# CARGO_TARGET_DIR as `cargo build --release --features cuda` does, so that a second run compiles what changed. The binary needs the C
# library of the machine that builds it, or a newer one: it says which.
set -euo pipefail
cd "$(dirname "$0")/.."

# What every glibc system has.
SYSTEM='lib(c|m|dl|rt|pthread|gcc_s)\.so\.[0-9]+|ld-linux-.*\.so\.[0-9]+'

fail() {
    echo "error: $1" >&2
    [ $# -lt 2 ] || printf '\nhint: %s\n' "$2" >&2
    exit 2
}

# Whether the file needs nothing else to start, and starts with an empty environment.
check() {
    local needed
    needed=$(readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | grep -Evx "$SYSTEM" || true)
    [ -z "$needed" ] || fail "the binary needs $(echo $needed) to start" "src/kernels/cuda/functions.rs lacks a function of it"
    env -i "$1" --version >&2 || fail "the binary does not start with an empty environment"
}

main() {
    local out=${1:-dist} cache environment target version binary glibc
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "releases are made on Linux x86-64" "elsewhere CUDA builds need its libraries to start"
    command -v strip >/dev/null && command -v readelf >/dev/null || fail "no \`strip\` or \`readelf\`" "install binutils"
    if ! command -v nvcc >/dev/null; then
        cache=${QUANTBENCH_CI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/quantbench-ci}
        environment=$(scripts/cuda-toolkit.sh "$cache/cuda-13.0")
        eval "$environment"
    fi
    cargo build --release --locked --features cuda
    target=${CARGO_TARGET_DIR:-target}
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
    binary=$out/quantbench-$version-x86_64-linux-gnu
    mkdir -p "$out"
    strip -o "$binary" "$target/release/quantbench"
    check "$binary"
    (cd "$out" && sha256sum "$(basename "$binary")" >"$(basename "$binary").sha256")
    glibc=$(readelf -V "$binary" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
    echo "$binary: $(stat -c %s "$binary") bytes, for glibc ${glibc#GLIBC_} or newer"
    echo "figures to measure anew with this binary:"
    scripts/stale-figures.sh | grep -v ': current$' || echo "none"
}

main "$@"
