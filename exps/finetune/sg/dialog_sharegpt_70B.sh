#!/usr/bin/env bash
# LLaMA 2 70B, all parameters, on ShareGPT's dialogs.
# 2 rows x 64 micro-batches x 4 data-parallel ranks = 512 rows a step on 32 ranks.
# Needs PRETRAINED (LLaMA 2 70B), DATA.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" finetune/sg/dialog_sharegpt_70B "$@"
