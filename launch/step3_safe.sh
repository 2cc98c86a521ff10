#!/usr/bin/env bash
# Step 3 with a limit on the mean cost (Safe RLHF): SFT model + reward model + cost model + prompts -> OUT/final
#   bash launch/step3_safe.sh --actor_model_name_or_path OUT1/final --reward_model_name_or_path OUT2/final \
#       --cost_model_name_or_path COST/final --prompt_data F.jsonl --output_dir OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step3_ppo.safe.main output/step3_safe "$@"
