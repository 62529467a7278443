#!/usr/bin/env bash
# LLaMA 7B from random weights, one document per row.
# 4 rows x 16 micro-batches x 8 data-parallel ranks = 512 rows a step.
# Needs DATA, TOKENIZER.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" pretrain/vanilla "$@"
