#!/bin/sh
# Checks the engine's numerics on a device and prints tokens per second. No network: models are random and made here.
#
#   benchmarks/gpu/run.sh                          on the first CUDA device, a model of 0.6 billion parameters
#   benchmarks/gpu/run.sh --device cpu --size tiny  anywhere
#
# PYTHON names the interpreter; default: .venv/bin/python of the repository.
set -eu
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-.venv/bin/python}"
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1
"$PYTHON" -m benchmarks.gpu.numerics "$@"
"$PYTHON" -m benchmarks.gpu.throughput "$@"
