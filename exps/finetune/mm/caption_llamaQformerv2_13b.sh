#!/usr/bin/env bash
# LLaMA 2 13B, stage one: Q-Former and projection learn captions for a frozen language model.
# 16 rows x 4 micro-batches x 4 data-parallel ranks = 256 rows a step on 8 ranks.
# Needs PRETRAINED twice (LLaMA 2 13B; a folder with BLIP-2's tower and Q-Former), DATA.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" finetune/mm/caption_llamaQformerv2_13b "$@"
