#!/usr/bin/env bash
# Score responses with a reward model or an ensemble: records -> the same records with a `score`
#   bash launch/score.sh --reward_model_name_or_path OUT2/final --input F.jsonl --output G.jsonl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_alone step2_reward.evaluation.score_file "$@"
