#!/usr/bin/env bash
# One stripped Linux binary with CUDA that starts on every machine of this architecture, with or without a GPU, a driver or CUDA's
# libraries: it opens them where it finds them (docs/offline.md). Beside it a tarball with man pages and completions, and a wheel.
#
#   scripts/release.sh [--cpu] [DIR]      writes into DIR (default: dist), then lists the figures of README.md and docs/ whose kernels changed
#                                         since they were measured; --cpu leaves CUDA out
#
#   quantbench-VERSION-TARGET             the binary, and its SHA-256
#   quantbench-VERSION-TARGET.tar.gz      bin/, share/man/man1/, completions of bash, zsh and fish, README and licences
#   quantbench-VERSION-py3-none-….whl     the binary for `pip install`, where `maturin` is on PATH
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

# The binary of $1 with its pages and completions, as $2.tar.gz: unpack it into a prefix such as /usr/local with --strip-components=1.
tarball() {
    local binary=$1 name=$2 out=$3 folder
    folder=$(mktemp -d)/$name
    mkdir -p "$folder"/{bin,share/man/man1,share/bash-completion/completions,share/zsh/site-functions,share/fish/vendor_completions.d,share/doc/quantbench}
    install -m 755 "$binary" "$folder/bin/quantbench"
    "$binary" man --output "$folder/share/man/man1" >&2
    "$binary" completions bash >"$folder/share/bash-completion/completions/quantbench"
    "$binary" completions zsh >"$folder/share/zsh/site-functions/_quantbench"
    "$binary" completions fish >"$folder/share/fish/vendor_completions.d/quantbench.fish"
    cp README.md CHANGELOG.md LICENSE* "$folder/share/doc/quantbench/"
    tar czf "$out/$name.tar.gz" --owner=0 --group=0 --numeric-owner -C "$(dirname "$folder")" "$name"
    rm -r "$(dirname "$folder")"
}

# Compiles what cargo has compiled already: nothing.
wheel() {
    local out=$1
    shift
    if command -v maturin >/dev/null; then
        maturin build --release --locked --out "$out" "$@" >&2
    else
        echo "no wheel: \`maturin\` is not on PATH (pip install maturin)" >&2
    fi
}

main() {
    local features=(--features cuda) cache environment target version name binary glibc
    if [ "${1:-}" = --cpu ]; then
        features=()
        shift
    fi
    local out=${1:-dist}
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "releases are made on Linux x86-64" "elsewhere CUDA builds need its libraries to start"
    command -v strip >/dev/null && command -v readelf >/dev/null || fail "no \`strip\` or \`readelf\`" "install binutils"
    if [ ${#features[@]} -gt 0 ] && ! command -v nvcc >/dev/null; then
        cache=${QUANTBENCH_CI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/quantbench-ci}
        environment=$(scripts/cuda-toolkit.sh "$cache/cuda-13.0")
        eval "$environment"
    fi
    cargo build --release --locked "${features[@]}"
    target=${CARGO_TARGET_DIR:-target}
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
    name=quantbench-$version-x86_64-linux-gnu
    [ ${#features[@]} -gt 0 ] || name+=-cpu
    binary=$out/$name
    mkdir -p "$out"
    strip -o "$binary" "$target/release/quantbench"
    check "$binary"
    tarball "$binary" "$name" "$out"
    wheel "$out" "${features[@]}"
    (cd "$out" && sha256sum "$name" >"$name.sha256" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
    glibc=$(readelf -V "$binary" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
    echo "$binary: $(stat -c %s "$binary") bytes, for glibc ${glibc#GLIBC_} or newer"
    echo "figures to measure anew with this binary:"
    scripts/stale-figures.sh | grep -v ': current$' || echo "none"
}

main "$@"
