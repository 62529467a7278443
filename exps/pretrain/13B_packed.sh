#!/usr/bin/env bash
# LLaMA 13B from random weights, on packed rows.
# 4 rows x 16 micro-batches x 4 data-parallel ranks = 256 rows a step on 8 ranks.
# Needs DATA, TOKENIZER.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" pretrain/13B_packed "$@"
