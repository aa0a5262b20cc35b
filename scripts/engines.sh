#!/usr/bin/env bash
# A Python virtual environment with the engines that quantbench has adapters for, in versions that it was run with.
#
#   scripts/engines.sh DIR [--cuda]
#
# Then: quantbench --python DIR/bin/python --engine quantbench,transformers,llama.cpp --precision 16bit,8bit,4bit
# llama-cpp-python is compiled, with --cuda for GPUs: about ten minutes of one core, and it needs a C++ compiler.
set -euo pipefail

dir=${1:?usage: scripts/engines.sh DIR [--cuda]}
python=${PYTHON:-python3}
"$python" -m venv "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check "$@"; }

case ${2-} in
    "" | --cuda) pip install torch==2.15.0 ;;
    *) echo "usage: scripts/engines.sh DIR [--cuda]" >&2; exit 2 ;;
esac
pip install transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 accelerate bitsandbytes==0.50.2 numpy==2.4.6
if [[ ${2-} == --cuda ]]; then
    CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python==0.3.36
else
    pip install llama-cpp-python==0.3.36
fi
"$dir/bin/python" -c 'import torch, transformers, bitsandbytes, llama_cpp; print("engines: transformers", transformers.__version__, "llama-cpp-python", llama_cpp.__version__)'
