#!/bin/bash
# All measurements on one GPU, in at most 8 minutes: experiments/benchmarks/gpu.sh [--toy]
#
# Needs a python3 with JAX and PyTorch for the GPU, peft and transformers. For a machine without a network, other packages are wheels in
# .whl: `python3 -m pip download --no-deps -d .whl ml_collections`. Results: gpu.json and gpu.md in $OUT, by default experiments/results.
# --toy rehearses it with tiny shapes on a CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
if compgen -G '.whl/*.whl' > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
    export PYTHONPATH=/tmp/site
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.6  # the rest is PyTorch's
exec timeout --signal=INT 480 "$python" -m experiments.benchmarks.gpu --out="${OUT:-experiments/results}" "$@"
