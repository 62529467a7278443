#!/usr/bin/env bash
# Makes accessory/tiny from nothing and examines it: data, tokenizer, training, weights, example picture, evaluation.
# Usage: bash exps/tiny/run.sh [OUT]      OUT: folder to write (default: output/tiny). PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-output/tiny}
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONHASHSEED=0 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES=
"$python" exps/tiny/train.py --out "$out"
"$python" exps/tiny/evaluate.py --model "$out"
