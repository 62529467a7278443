#!/usr/bin/env bash
# LLaMA 2 13B, stage two: norms, biases and LoRA over a 4-bit base learn to answer about pictures.
# 16 rows x 1 micro-batches x 8 data-parallel ranks = 128 rows a step.
# Needs PRETRAINED (caption_llamaQformerv2_13b), DATA.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" finetune/mm/alpacaLlava_llamaQformerv2Peft_QF_13b "$@"
