#!/usr/bin/env bash
# LLaMA 2 13B, all parameters, on ShareGPT's dialogs.
# 4 rows x 8 micro-batches x 4 data-parallel ranks = 128 rows a step on 8 ranks.
# Needs PRETRAINED (LLaMA 2 13B), DATA.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" finetune/sg/dialog_sharegpt_13B "$@"
