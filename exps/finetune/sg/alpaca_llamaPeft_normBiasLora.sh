#!/usr/bin/env bash
# LLaMA 2 7B, norms, biases and LoRA, on alpaca_gpt4.
# 4 rows x 2 micro-batches x 8 data-parallel ranks = 64 rows a step.
# Needs PRETRAINED (LLaMA 2 7B), DATA.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" finetune/sg/alpaca_llamaPeft_normBiasLora "$@"
