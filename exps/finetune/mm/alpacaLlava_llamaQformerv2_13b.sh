#!/usr/bin/env bash
# LLaMA 2 13B, stage two: language model and Q-Former learn to answer about pictures.
# 4 rows x 2 micro-batches x 4 data-parallel ranks = 32 rows a step on 8 ranks.
# Needs PRETRAINED (caption_llamaQformerv2_13b), DATA.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" finetune/mm/alpacaLlava_llamaQformerv2_13b "$@"
