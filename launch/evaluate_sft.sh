#!/usr/bin/env bash
# Evaluate language models on the same demonstrations: perplexity and sample responses, in one table
#   bash launch/evaluate_sft.sh --model_name_or_path DIR_OR_HUB_ID ... --eval_data F.jsonl --output FIGURES.json
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
# Without an output folder there is no train.log.
run_stage step1_sft.evaluate /dev/null "$@"
