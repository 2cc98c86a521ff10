#!/usr/bin/env bash
# Step 3, PPO: SFT model + reward model + prompts -> OUT/final
#   bash launch/step3_ppo.sh --actor_model_name_or_path OUT1/final --reward_model_name_or_path OUT2/final --prompt_data F.jsonl --output_dir OUT
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
run_stage step3_ppo.main output/step3_ppo "$@"
