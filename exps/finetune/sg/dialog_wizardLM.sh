#!/usr/bin/env bash
# LLaMA 2 7B, all parameters, on WizardLM's evolved instructions.
# 4 rows x 8 micro-batches x 8 data-parallel ranks = 256 rows a step.
# Needs PRETRAINED (LLaMA 2 7B), DATA.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" finetune/sg/dialog_wizardLM "$@"
