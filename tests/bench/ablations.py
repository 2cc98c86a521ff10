"""Step 3 of the quickstart with one safeguard off at a time: what the gold rule and KL say at the end.

    bash launch/quickstart.sh
    python tests/bench/ablations.py [--seeds 0 1 2] [--only "no KL penalty" ...]

What an option turns off is turned off by it; what only a mistake in the code would do is done to the code.
Runs, with all their metrics, are kept beside the quickstart's own; a run that is there already is only read.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SETTINGS = (
    "--max_response_length 64 --rollout_batch_size 128 --global_batch_size 64 --micro_batch_size 64"
    " --ppo_epochs 2 --max_steps 60 --eval_steps 10 --save_steps 0 --max_eval_samples 0 --num_samples 8"
    " --actor_learning_rate 3e-4 --critic_learning_rate 1e-3 --kl_coef 0.05"
    " --max_rollout_gap 99"  # an ablation does not end the run
)
FIGURES = ("eval/gold", "eval/score", "eval/kl", "eval/length", "eval/eos_rate", "eval/distinct_2")

OFF = "policy/ratio off 1"  # mean distance, of the first minibatch, before the policy has moved


def wrap(module: Any, name: str, around: Callable[..., Any]) -> None:
    """Have `around` called in place of a function, with that function as its first argument."""
    inner = getattr(module, name)
    setattr(module, name, wraps(inner)(lambda *values, **named: around(inner, *values, **named)))


def mismatch_temperature() -> None:
    """Draw at 0.7 what the update believes to have been drawn at 1."""
    from common.generation import generate as generation

    wrap(
        generation, "sample_responses",
        lambda inner, model, prompts, uniforms, _, *rest, **named: inner(
            model, prompts, uniforms, 0.7, *rest, **named
        ),
    )  # fmt: skip


def leave_dropout_on() -> None:
    """Models of a dropout of 0.1 keep it in the updates."""
    from common.model import loading as models

    def with_dropout(inner: Callable[..., Any], path: str) -> Any:
        config = inner(path)
        config.attention_dropout = 0.1
        return config

    wrap(models, "load_config", with_dropout)


def mask_eos() -> None:
    """What a pad token that is EOS leads to: EOS is not learnt, and the token before it gets the score."""
    from step3_ppo import main

    def cut(rollout: Any) -> Any:
        return replace(
            rollout, response_lengths=(rollout.response_lengths - rollout.ended.long()).clamp(min=1)
        )

    def without_eos(inner: Callable[..., Any], rollout: Any, *rest: Any) -> Any:
        advantages, returns = inner(cut(rollout), *rest)
        return advantages, torch.where(cut(rollout).response_mask, returns, rollout.values)

    wrap(main, "shape_rewards", lambda inner, rollout, *rest: inner(cut(rollout), *rest))
    wrap(main, "estimate_advantages", without_eos)


ABLATIONS: dict[str, str | Callable[[], None]] = {
    "as shipped": "",
    "no advantage whitening": "--whiten_advantages False",
    "no KL penalty": "--kl_coef 0",
    "no value clip": "--value_clip_range 1e9",
    "temperature mismatch": mismatch_temperature,
    "dropout on": leave_dropout_on,
    "EOS masked": mask_eos,
}


def run(name: str, seed: int, quickstart: Path) -> dict[str, float]:
    """The last evaluation of one run, which is made unless it is there."""
    output = quickstart / "ablations" / f"{name.replace(' ', '_')}_{seed}"
    if not (output / "final" / "config.json").exists():
        ablation = ABLATIONS[name]
        options = f"{SETTINGS} {ablation if isinstance(ablation, str) else ''} --seed {seed}".split()
        options += ["--actor_model_name_or_path", str(quickstart / "step1_sft" / "final")]
        options += ["--reward_model_name_or_path", str(quickstart / "step2_reward" / "final")]
        options += ["--prompt_data", str(quickstart / "world" / "prompts.jsonl")]
        options += ["--eval_data", str(quickstart / "world" / "prompts_heldout.jsonl")]
        options += ["--gold_function", f"{Path(__file__).with_name('gold.py')}:market"]
        options += ["--output_dir", str(output)]
        command = [sys.executable, __file__, "--as", name, *options]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"ablations.py: {name}, seed {seed}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    off = fmean(abs(line["policy/ratio"] - 1) for line in lines if "policy/ratio" in line)
    last = [line for line in lines if "eval/gold" in line][-1]
    return {name: last[name] for name in FIGURES} | {OFF: off}


def spread(values: list[float]) -> str:
    """Mean of the seeds, and their standard deviation if there are several."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    if sys.argv[1:2] == ["--as"]:
        name = sys.argv[2]
        sys.argv[1:] = sys.argv[3:]
        from common.runtime.process import run_main
        from step3_ppo.main import main as step3

        if callable(ABLATIONS[name]):
            ABLATIONS[name]()
        run_main(step3)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    options = parser.parse_args()
    columns = [*FIGURES, OFF]
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in options.only:
        found = [run(name, seed, options.quickstart) for seed in options.seeds]
        cells = [spread([one[column] for one in found]) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
