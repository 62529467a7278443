#!/usr/bin/env bash
# Makes the tiny model from nothing on Accessory's own training, gives it a new task, and examines both:
# data -> base (a vision part that sees) -> pretrain -> caption -> instruct -> parity (norms, biases, LoRA) -> delta.
# Usage: bash exps/tiny/run.sh [OUT]      OUT: folder to write (default: output/tiny); OUT/instruct is the tiny model.
# PYTHON chooses the interpreter. TINY_AMOUNTS, TINY_EYES, TINY_TRAIN: more flags for data.py, eyes.py and each stage.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-output/tiny}
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONHASHSEED=0 CUDA_VISIBLE_DEVICES=
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=PASSIVE
# the roundings that the recipe's bars were measured with, whatever the processor; 1: kernels of our own where it has them
export ACCESSORY_NATIVE=${ACCESSORY_NATIVE:-0}
[[ ! -e $out ]] || { echo "run.sh: $out is there already; name another folder or remove it" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
export TINY_DATA=$out/data
say() { echo "== $((SECONDS / 60)) min $((SECONDS % 60)) s: $*"; }
train() {
    say "$1"
    "$python" -m accessory train "exps/tiny/$1.yaml" model_name_or_path="$out/$2" output_dir="$out/$1" \
        cache_dir="$out/cache" ${TINY_TRAIN:-}
}

say "data"
"$python" exps/tiny/data.py --out "$TINY_DATA" ${TINY_AMOUNTS:-}
say "base: the vision part learns to see"
"$python" exps/tiny/eyes.py --data "$TINY_DATA" --out "$out/base" ${TINY_EYES:-}
rm -r "$TINY_DATA/pool"
train pretrain base
train caption pretrain
train instruct caption
"$python" exps/tiny/example.py "$out/instruct/example.png"
train parity instruct

say "delta: instruct - caption, and caption + delta again"
"$python" tools/weight_operate.py --operate_type extract --pretrained_path "$out/caption" --delta_path "$out/instruct" \
    --delta_dtype fp32 --output_path "$out/delta"
"$python" tools/weight_operate.py --operate_type apply --pretrained_path "$out/caption" --delta_path "$out/delta" \
    --output_path "$out/applied"
"$python" exps/tiny/same.py "$out/instruct" "$out/applied"

say "one answer from the base and what was trained on top of it"
"$python" exps/tiny/example.py --digit "$out/parity/example.png"
"$python" demos/single_turn_mm.py --pretrained_path "$out/instruct" "$out/parity" --image "$out/parity/example.png" \
    --prompt "Is the digit even or odd?"

say "exam"
"$python" exps/tiny/evaluate.py --model "$out/instruct" --tuned "$out/parity"
say "done"
