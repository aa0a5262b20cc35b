#!/usr/bin/env bash
# A CUDA 13.0 toolkit for building `--features cuda`, without root and without a GPU.
#
#   scripts/cuda-toolkit.sh DIR          install into DIR where nvcc is missing, and print the environment to use
#   eval "$(scripts/cuda-toolkit.sh DIR)" && cargo build --release --features cuda
#
# An nvcc 13.0 that is already on PATH (or under CUDA_HOME) is used as it is. Otherwise NVIDIA's Python wheels go into a
# virtual environment in DIR: nvcc, headers, cuBLAS, cuRAND, NVRTC (about 2.5 GB), and cuobjdump and nvdisasm, with which
# tests/sass.rs reads what nvcc made. They lack two things that linking needs, made here: `lib*.so` names without a version,
# and a libcuda to link against, whose every function returns CUDA_ERROR_STUB_LIBRARY. Only lines to `eval` go to stdout. A
# second run finds DIR complete and only prints.
set -euo pipefail

RELEASE=13.0
PACKAGES="nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt nvidia-nvvm nvidia-cublas nvidia-cuda-nvrtc"
# cuRAND has its own numbering; 10.4.0 is the one of CUDA 13.0.
CURAND="nvidia-curand==10.4.0.*"
# The first releases that are wheels; they read the code of older ones.
DISASSEMBLERS="nvidia-cuda-cuobjdump==13.2.* nvidia-cuda-nvdisasm==13.2.*"

fail() {
    echo "error: $1" >&2
    [ $# -lt 2 ] || printf '\nhint: %s\n' "$2" >&2
    exit 2
}

say() { echo "cuda-toolkit: $*" >&2; }

# The release that an nvcc reports, as `13.0`; nothing when it does not run.
release_of() { "$1" --version 2>/dev/null | sed -n 's/.*release \([0-9]*\.[0-9]*\),.*/\1/p'; }

# The folder of the toolkit that this machine already has.
installed_home() {
    local nvcc
    for nvcc in "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
        if [ -x "$nvcc" ] && [ "$(release_of "$nvcc")" = "$RELEASE" ]; then
            dirname "$(dirname "$(readlink -f "$nvcc")")"
            return
        fi
    done
}

install_wheels() {
    local dir=$1 python package
    python=$(command -v python3) || fail "python3 is missing" "install Python 3.9 or newer, or a CUDA $RELEASE toolkit with nvcc on PATH"
    command -v "${CC:-cc}" >/dev/null || fail "no C compiler \`${CC:-cc}\`" "install gcc; nvcc needs g++ as well"
    [ "$(uname -m)" = x86_64 ] || [ "$(uname -m)" = aarch64 ] || fail "no CUDA wheels for $(uname -m)"
    if [ ! -x "$dir/bin/python3" ] || ! "$dir/bin/python3" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv "$dir" >&2 || fail "\`python3 -m venv $dir\` failed" "install the venv module (Debian: apt install python3-venv)"
    fi
    set --
    for package in $PACKAGES; do set -- "$@" "$package==$RELEASE.*"; done
    say "installing CUDA $RELEASE into $dir (a few minutes, once)"
    "$dir/bin/python3" -m pip install --quiet --disable-pip-version-check "$@" "$CURAND" >&2 ||
        fail "pip could not install the CUDA $RELEASE wheels" "check the network; PIP_INDEX_URL or PIP_FIND_LINKS name a mirror"
}

# Without them tests/sass.rs skips, so that a toolkit which was made before stays good without network.
install_disassemblers() {
    local dir=$1 home=$2
    [ ! -x "$home/bin/cuobjdump" ] || [ ! -x "$home/bin/nvdisasm" ] || return 0
    # shellcheck disable=SC2086
    "$dir/bin/python3" -m pip install --quiet --disable-pip-version-check $DISASSEMBLERS >&2 ||
        say "pip could not install cuobjdump and nvdisasm; the checks of machine code will skip"
}

wheels_home() {
    local home
    for home in "$1"/lib/python3*/site-packages/nvidia/cu13; do
        if [ -x "$home/bin/nvcc" ]; then echo "$home"; fi
    done | head -n 1
}

# `-lcublas` looks for libcublas.so; the wheels hold libcublas.so.13 alone.
link_unversioned() {
    local library plain
    for library in "$1"/lib/lib*.so.[0-9]*; do
        plain=${library%%.so.*}.so
        [ -e "$plain" ] || ln -s "$(basename "$library")" "$plain"
    done
}

# Every function name of cuda.h, the versioned ones too, as a function that returns 34 (CUDA_ERROR_STUB_LIBRARY).
build_stub() {
    local stubs=$1/lib/stubs
    mkdir -p "$stubs"
    grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$1/include/cuda.h" | sort -u | sed 's/.*/int &(void) { return 34; }/' |
        "${CC:-cc}" -w -shared -fPIC -Wl,-soname,libcuda.so.1 -x c -o "$stubs/libcuda.so.1" - || fail "could not compile the stub libcuda"
    ln -sf libcuda.so.1 "$stubs/libcuda.so"
}

# Whether the loader finds a real driver by itself: the stub must not hide it.
has_driver() { PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1'; }

print_environment() {
    local home=$1 libraries="$1/lib" stubs=""
    [ -d "$home/lib64" ] && libraries="$home/lib64"
    [ -d "$libraries/stubs" ] && stubs="$libraries/stubs"
    echo "export CUDA_HOME='$home'"
    echo "export PATH='$home/bin':\"\$PATH\""
    echo "export LIBRARY_PATH='$libraries${stubs:+:$stubs}'\"\${LIBRARY_PATH:+:\$LIBRARY_PATH}\""
    if [ -n "$stubs" ] && has_driver; then stubs=""; fi
    echo "export LD_LIBRARY_PATH='$libraries${stubs:+:$stubs}'\"\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}\""
    # candle's kernels become PTX for this and run on everything newer; 90 would mean sm_90a, which loads on H100 alone.
    echo "export CUDA_COMPUTE_CAP=75"
}

main() {
    [ $# -eq 1 ] && [ -n "$1" ] || fail "usage: scripts/cuda-toolkit.sh DIR" 'DIR holds the toolkit; eval the lines printed'
    local home
    home=$(installed_home)
    # A toolkit that this script made is finished below; any other one is left as it is.
    if [ -z "$home" ] || [ -z "${home##*/nvidia/cu13}" ]; then
        mkdir -p "$1" || fail "cannot create \`$1\`"
        local dir
        dir=$(cd "$1" && pwd)
        if [ ! -e "$dir/complete-$RELEASE" ]; then
            install_wheels "$dir"
            home=$(wheels_home "$dir")
            [ -n "$home" ] || fail "the wheels in $dir hold no bin/nvcc" "remove the folder and run this again"
            link_unversioned "$home"
            build_stub "$home"
            touch "$dir/complete-$RELEASE"
        fi
        home=$(wheels_home "$dir")
        install_disassemblers "$dir" "$home"
    fi
    [ "$(release_of "$home/bin/nvcc")" = "$RELEASE" ] || fail "$home/bin/nvcc does not run as CUDA $RELEASE" "remove $1 and run this again"
    print_environment "$home"
}

main "$@"
