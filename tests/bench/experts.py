"""Load-balancing loss of a mixture of experts, on the quickstart's demonstrations.

    bash launch/quickstart.sh
    python tests/bench/experts.py [--seeds 0 1 2] [--only qwen3_moe]

A random model of 8 experts, 2 per token, is trained by step 1 with the loss off and on
(`router_aux_loss_coef`). Runs that are there already are only read.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quickstart_runs import last, once, parse, read, spread

SETTINGS = (
    "--max_length 96 --max_steps 300 --global_batch_size 32 --micro_batch_size 32 --learning_rate 5e-3"
    " --eval_steps 0 --save_steps 0 --logging_steps 1 --num_samples 0"
)
COEFS = (0.0, 0.001, 0.02)
FIGURES = ("router/max_load", "router/unused", "router/entropy", "train/loss")
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 8}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 8, "moe_intermediate_size": 64}),
}


def write_model(quickstart: Path, name: str, coef: float, seed: int) -> Path:
    """A folder with random weights, the same for all coefficients, and the quickstart's tokenizer."""
    folder = quickstart / "experts" / f"{name}_{coef:g}_{seed}" / "model"
    if folder.exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "world/model")
    model_class, config_class, sizes = MODELS[name]
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=256,
        num_experts_per_tok=2, router_aux_loss_coef=coef, output_router_logits=coef > 0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **sizes,
    )  # fmt: skip
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(quickstart: Path, name: str, coef: float, seed: int) -> list[float]:
    """Means over the last 50 of 300 steps."""
    folder = write_model(quickstart, name, coef, seed)
    output = once(
        "step1_sft.main", f"{SETTINGS} --seed {seed}", folder.parent / "run", model_name_or_path=folder,
        train_data=quickstart / "world/demonstrations.jsonl",
    )  # fmt: skip
    lines = read(output / "metrics.jsonl")
    return [last(lines, figure, 50) for figure in FIGURES]


def main() -> None:
    options = parse(__doc__, list(MODELS))
    print(f"| model | `router_aux_loss_coef` | {' | '.join(FIGURES)} |")
    print(f"|{'---|' * 6}")
    for name in options.only:
        for coef in COEFS:
            rows = [run(options.quickstart, name, coef, seed) for seed in options.seeds]
            cells = [spread(column, 3) for column in zip(*rows, strict=True)]
            print(f"| {name} | {coef:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
