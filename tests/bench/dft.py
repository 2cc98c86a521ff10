"""Dynamic fine-tuning beside the usual loss, on demonstrations of which many are wrong or rude.

    bash launch/quickstart.sh
    python tests/bench/dft.py [--seeds 0 1 2]

The quickstart's SFT model is trained on its demonstrations again, with either loss and the same settings. The
gold rule judges sampled answers to held-out prompts. Runs that are there already are only read.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quickstart_runs import ROOT, once, parse, spread

SETTINGS = (
    "--max_length 96 --max_steps 200 --global_batch_size 32 --micro_batch_size 32 --learning_rate 2e-3"
    " --eval_steps 0 --save_steps 0"
)
LOSSES = ("nll", "dft")


def figures(quickstart: Path, loss: str, seed: int) -> list[float]:
    """Gold score, KL to the SFT model and distinct-2 within an answer."""
    sft, runs = quickstart / "step1_sft/final", quickstart / "dft"
    policy = sft
    if loss != "SFT model":
        policy = once(
            "step1_sft.main", f"{SETTINGS} --token_loss {loss} --seed {seed}", runs / f"{loss}_{seed}",
            model_name_or_path=sft, train_data=quickstart / "world/demonstrations.jsonl",
        ) / "final"  # fmt: skip
    report = once(
        "step3_ppo.compare.main",
        f"--max_response_length 64 --seed {seed} --max_eval_samples 0 --reward_function"
        f" {ROOT}/tests/bench/gold.py:market --model_name_or_path {sft} {policy}",
        runs / f"report_{loss}_{seed}", "report.json",
        prompt_data=f"{quickstart}/world/prompts_heldout.jsonl:4",
    )  # fmt: skip
    judged = json.loads((report / "report.json").read_text())["policies"][-1]
    (gold,) = judged["scores"].values()
    return [gold["mean"], judged["kl"]["mean"], judged["distinct_2"]]


def main() -> None:
    options = parse(__doc__, LOSSES)
    print("| `--token_loss` | gold | KL | distinct-2 |\n|---|---|---|---|")
    for loss in ("SFT model", *options.only):
        rows = [figures(options.quickstart, loss, seed) for seed in options.seeds]
        cells = [spread(column, 3) for column in zip(*rows, strict=True)]
        print(f"| {loss} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
