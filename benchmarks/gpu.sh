#!/usr/bin/env bash
# Everything that needs a GPU, as one command of under nine minutes on one card. It prints one table and writes it to
# gpu.csv and gpu.json in the folder --out, $OUT, or output/gpu.
#
#   benchmarks/gpu.sh                          on a GPU
#   benchmarks/gpu.sh --device cpu --quick     dry run with tiny models
#   benchmarks/gpu.sh --parts parity resume    some parts
#
# PYTHON is the interpreter (python3). It needs torch, timm, huggingface_hub, accelerate, safetensors and scikit-learn;
# nothing is installed or downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
