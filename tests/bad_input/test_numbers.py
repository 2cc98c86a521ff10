"""Options whose number no library can hold, or no layer, core or file can match; names of modules."""

from pathlib import Path

import pytest

from tests.bad_input.commands import check_refusal

LORA = ["--lora_rank", "4"]
HUGE = "1" + "0" * 40
SAMPLING = ("step3_ppo", "best_of_n", "sample_pairs", "critique", "evaluate_ppo")
REFUSED = [
    ("step1_sft", ["--seed", HUGE], "--seed"),
    ("step2_reward", ["--seed", str(2**63)], "--seed"),
    ("chat", ["--seed", HUGE], "--seed"),
    ("annotate", ["--seed", HUGE], "--seed"),
    ("judge", ["--seed", "-1"], "--seed"),
    ("critique", ["--seed", "nan"], "--seed"),
    ("step1_sft", ["--timeout_minutes", "1e30"], "--timeout_minutes"),
    ("judge", ["--timeout_minutes", "inf"], "--timeout_minutes"),
    ("best_of_n", ["--timeout_minutes", "1e10"], "--timeout_minutes"),
    ("critique", ["--timeout_minutes", "1e-300"], "1e-300 minutes"),
    ("step1_sft", ["--max_steps", HUGE], "--max_steps"),
    ("step3_ppo", ["--max_steps", "1e3"], "--max_steps"),
    ("step1_sft", ["--num_train_epochs", "1e308"], "--num_train_epochs"),
    ("step2_direct", ["--learning_rate", "nan"], "--learning_rate"),
    ("step2_reward", ["--weight_decay", "1e308"], "--weight_decay"),
    ("step3_ppo", ["--score_clip", "1e308"], "--score_clip"),
    ("step3_ppo", ["--clip_range", "inf"], "--clip_range"),
    ("step3_ppo", ["--clip_range_high", "-0.1"], "--clip_range_high"),
    ("step3_ppo", ["--loss_aggregation", "mean"], "--loss_aggregation"),
    ("step3_ppo", ["--policy_loss", "grpo"], "--policy_loss"),
    ("step3_ppo", ["--entropy_low", "0.5", "--entropy_high", "0.4"], "--entropy_low 0.5"),
    ("step3_ppo", ["--critic_warmup_until", "0.5"], "--critic_warmup_until 0.5"),
    ("step3_ppo", ["--critic_gae_lambda", "1.1"], "--critic_gae_lambda"),
    ("step3_ppo", ["--length_adaptive_lambda", "nan"], "--length_adaptive_lambda"),
    ("step3_ppo", ["--overlong_buffer", "100000"], "--overlong_buffer 100000"),
    ("step3_ppo", ["--max_redraws", "3"], "--max_redraws 3"),
    ("step3_ppo", ["--max_redraws", "1000"], "--max_redraws"),
    ("step3_ppo", ["--overlong_penalty", "0"], "--overlong_penalty"),
    ("step3_ppo", ["--rollout_batch_size", str(2**40)], "--rollout_batch_size"),
    ("step3_ppo", ["--ppo_epochs", HUGE], "--ppo_epochs"),
    ("step3_ppo", ["--share_prompts", "maybe"], "--share_prompts"),
    ("step2_direct", ["--report_to", "none", "tensorboard"], "--report_to none tensorboard"),
    ("step3_ppo", ["--share_prompts", "yes"], "--share_prompts yes: --samples_per_prompt 1"),
    ("step1_sft", ["--global_batch_size", str(2**40)], "--global_batch_size"),
    ("best_of_n", ["--samples_per_prompt", str(2**40)], "--samples_per_prompt"),
    ("best_of_n", ["--max_response_length", HUGE], "--max_response_length"),
    ("sample_pairs", ["--responses_per_prompt", str(2**40)], "--responses_per_prompt"),
    ("critique", ["--revision_rounds", str(2**40)], "--revision_rounds"),
    ("evaluate_ppo", ["--best_of", str(2**40)], "--best_of"),
    ("evaluate_reward", ["--micro_batch_size", HUGE], "--micro_batch_size"),
    ("step1_sft", ["--micro_batch_tokens", "-1"], "--micro_batch_tokens -1"),
    ("step3_ppo", ["--micro_batch_tokens", HUGE], "--micro_batch_tokens"),
    ("score", ["--micro_batch_tokens", "4k"], "--micro_batch_tokens"),
    ("step1_sft", ["--packing", "--micro_batch_tokens", "64"], "--micro_batch_tokens 64"),
    ("evaluate_sft", ["--sample_length", "-1"], "--sample_length"),
    ("step1_sft", ["--attn_implementation", "flash_attention_2"], "needs a GPU, and pip install flash-attn"),
    ("score", ["--attn_implementation", "flash_attention_3"], "needs a GPU"),
    ("judge", ["--attn_implementation", "varlen"], "needs an NVIDIA GPU of compute capability 8.0"),
    ("best_of_n", ["--attn_implementation", "flash"], "--attn_implementation"),
    ("score", ["--max_length", HUGE], "--max_length"),
    ("chat", ["--temperature", "nan"], "--temperature"),
    ("step3_ppo", ["--rollout_tensor_parallel", "0"], "--rollout_tensor_parallel"),
    ("best_of_n", ["--rollout_tensor_parallel", "2"], "--rollout_tensor_parallel 2: needs"),
    ("sample_pairs", ["--rollout_engine", "sglang"], "--rollout_engine"),
    ("step3_ppo", ["--compile_generation", "maybe"], "--compile_generation"),
    # Without vLLM because it is absent, else because of the model's small attention heads.
    *((command, ["--rollout_engine", "vllm"], "--rollout_engine vllm: ") for command in SAMPLING),
    ("plan", ["--num_gpus", HUGE], "--num_gpus"),
    ("plan", ["--gpus_per_node", "0"], "--gpus_per_node"),
    ("plan", ["--micro_batch_size", "1" * 5000], "--micro_batch_size"),
    ("plan", ["--gpu", "v100"], "--gpu"),
    ("plan", ["--measured_speeds", "DIR/absent.json"], "--measured_speeds DIR/absent.json: No such file"),
    ("annotate", ["--port", "70000"], "--port"),
    ("annotate", ["--host", "a..b"], "--host"),
    ("annotate", ["--host", "\u00e9" * 70], "--host"),
    ("step1_sft", ["--preprocessing_workers", "100000"], "--preprocessing_workers"),
    ("evaluate_ppo", ["--preprocessing_workers", "-1"], "--preprocessing_workers"),
    ("step1_sft", ["--data_split", "nan,1,1"], "--data_split"),
    ("step2_reward", ["--data_split", "0,0,0"], "--data_split"),
    ("step3_ppo", ["--data_split", "inf,1,1"], "--data_split"),
    ("step1_sft", ["--lora_rank", "33"], "--lora_rank 33"),
    ("step2_reward", ["--lora_rank", "1000000"], "--lora_rank"),
    ("step2_direct", ["--lora_rank", str(2**62)], "--lora_rank"),
    ("step3_ppo", ["--lora_rank", "1000000"], "--lora_rank"),
    ("plan", ["--lora_rank", "1000000"], "--lora_rank"),
    ("step1_sft", [*LORA, "--lora_target_modules", ""], "--lora_target_modules"),
    ("step2_reward", [*LORA, "--lora_target_modules", " "], "--lora_target_modules"),
    ("step2_direct", [*LORA, "--lora_target_modules"], "--lora_target_modules"),
    ("step3_ppo", [*LORA, "--lora_target_modules", "all-linear", "q_proj"], "--lora_target_modules"),
    ("plan", [*LORA, "--lora_target_modules", "q_proj,v_proj"], "--lora_target_modules"),
    ("step2_reward", [*LORA, "--lora_target_modules", "lm_head"], "--lora_target_modules lm_head"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_number_is_refused(models: Path, tmp_path: Path, number: int) -> None:
    command, words, part = REFUSED[number]
    check_refusal(command, words, part, models, tmp_path)
