"""Losses of step 2, direct, beside DPO: gold score, KL and variety of stories from one SFT model.

    python tests/bench/direct_losses.py --model DIR --data DIR --output DIR [--seeds 0 1 2] [--only dpo aot]

MODEL and DATA as in launch/recipes/stories.sh. Each run is step 2, direct, with the options below, forked
from this process; a run that is there already is only read. VADER sentiment on held-out prompts is the gold
score, as in stories_methods.sh. Prints a Markdown table: mean and standard deviation of the seeds, or of one
seed the 95 % interval of the gold score.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from quickstart_runs import spread

import tests.conftest  # noqa: F401 - the CPU, one thread
from tests.ranks import start_stage

GOLD = Path(__file__).with_name("gold.py")
STEPS = 30
COMMON = "--learning_rate 2e-4 --global_batch_size 32 --micro_batch_size 16 --eval_steps 0 --save_steps 0"
# --beta: where the loss begins to saturate at a log-ratio of some nats, as DPO's at 0.3.
RUNS = {
    "dpo": "--beta 0.3",
    "exo_pair": "--loss exo_pair --beta 0.3",
    "discopop": "--loss discopop --beta 0.3",
    "sigmoid_norm": "--loss sigmoid_norm --beta 10",
    "nca_pair": "--loss nca_pair --beta 0.3",
    "bco_pair": "--loss bco_pair --beta 0.3",
    "bco_pair, bco_shift": "--loss bco_pair --beta 0.3 --bco_shift",
    "sppo_hard": "--loss sppo_hard --beta 0.1",
    "apo_zero": "--loss apo_zero --beta 0.3",
    "apo_down": "--loss apo_down --beta 0.3",
    "apo_zero_unpaired": "--loss apo_zero_unpaired --beta 0.3",
    "aot": "--loss aot --beta 0.3",
    "aot_unpaired": "--loss aot_unpaired --beta 0.3",
    "dpo, forward_kl": "--beta 0.3 --f_divergence forward_kl",
    "dpo, js_divergence": "--beta 0.3 --f_divergence js_divergence",
    "dpo, alpha_divergence": "--beta 0.3 --f_divergence alpha_divergence",
    "dpo, ld_alpha 0.5": "--beta 0.3 --ld_alpha 0.5",
    "dpo, wpo": "--beta 0.3 --wpo",
    "simpo": "--loss simpo --beta 2 --learning_rate 1e-4",
    "simpo, alphapo_alpha 0.25": "--loss simpo --beta 2 --learning_rate 1e-4 --alphapo_alpha 0.25",
    "simpo_hinge": "--loss simpo_hinge --beta 2 --learning_rate 1e-4",
    "cpo": "--loss cpo --beta 0.3",
    "cpo_hinge": "--loss cpo_hinge --beta 0.3",
}


def start(options: argparse.Namespace, module: str, *words: str) -> None:
    result = start_stage(module, [*words], options.output / "logs", timeout=3600).result()
    if result.codes != [0]:
        sys.exit(result.output)


def train(options: argparse.Namespace, sft: Path, name: str, seed: int) -> Path:
    """Folder of the policy of a run."""
    folder = options.output / f"seed_{seed}" / name.replace(", ", "+").replace(" ", "_")
    words = [*f"{COMMON} --max_steps {STEPS} --seed {seed}".split(), *RUNS[name].split()]
    if not (folder / "final").exists():
        start(
            options, "step2_reward.direct.main", *words, "--model_name_or_path", str(sft), "--train_data",
            f"{options.data}/preferences.jsonl", "--output_dir", str(folder),
        )  # fmt: skip
    return folder / "final"


def judge(options: argparse.Namespace, policies: list[Path], seed: int) -> list[dict]:
    """Figures of the policies on held-out prompts, in order."""
    folder = options.output / f"seed_{seed}" / "report"
    start(
        options, "step3_ppo.compare.main", "--model_name_or_path", *map(str, policies), "--seed", str(seed),
        "--prompt_data", f"{options.data}/prompts.jsonl", "--max_eval_samples", "0", "--max_response_length",
        "48", "--max_length", "512", "--demonstration_data", f"{options.data}/demonstrations.jsonl",
        "--reward_function", f"{GOLD}:sentiment", "--output_dir", str(folder),
    )  # fmt: skip
    return json.loads((folder / "report.json").read_text())["policies"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("model", "data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[*RUNS])
    options = parser.parse_args()
    sft = options.output / "step1_sft" / "final"
    if not sft.exists():
        start(
            options, "step1_sft.main", "--model_name_or_path", str(options.model), "--train_data",
            f"{options.data}/demonstrations.jsonl", "--output_dir", str(sft.parent), "--max_length", "256",
            "--global_batch_size", "32", "--micro_batch_size", "16", "--learning_rate", "1e-4",
        )  # fmt: skip
    rows: dict[str, list[dict]] = {name: [] for name in ("SFT", *options.only)}
    for seed in options.seeds:
        policies = [sft, *(train(options, sft, name, seed) for name in options.only)]
        for name, figures in zip(rows, judge(options, policies, seed), strict=True):
            rows[name].append(figures)
    print("| loss | gold score | KL | distinct-2 | perplexity |\n|---|---|---|---|---|")
    for name, figures in rows.items():
        gold = [next(iter(one["scores"].values())) for one in figures]
        score = spread([one["mean"] for one in gold], 3)
        if len(gold) == 1:
            score += f" ± {(gold[0]['high'] - gold[0]['low']) / 2:.3f}"
        kl = spread([one["kl"]["mean"] for one in figures])
        variety, perplexity = (fmean(one[name] for one in figures) for name in ("distinct_2", "perplexity"))
        print(f"| {name} | {score} | {kl} | {variety:.3f} | {perplexity:.2f} |")


if __name__ == "__main__":
    main()
