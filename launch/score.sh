#!/usr/bin/env bash
# Score responses with a reward model or an ensemble: records -> the same records with a `score`
#   bash launch/score.sh --reward_model_name_or_path OUT2/final --input F.jsonl --output G.jsonl
set -euo pipefail
NUM_GPUS=1  # one process, on the first GPU of CUDA_VISIBLE_DEVICES; without one, on all cores

source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
install requirements.txt
run_alone step2_reward.evaluation.score_file "$@"
