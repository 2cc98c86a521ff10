"""SFT of a small pretrained model with all weights, with adapters, and with adapters on a base in 4 bits:
held-out loss and bytes of weights.

    python tests/bench/qlora.py --model DIR --data F.jsonl [--seeds 0 1 2] [--output output/qlora]

A run that is there already is only read.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SETTINGS = (
    "--max_length 256 --overlong truncate_response --global_batch_size 32 --micro_batch_size 8"
    " --max_eval_samples 0 --eval_steps 0 --save_steps 0 --num_samples 0"
)
EPOCHS = "--num_train_epochs 5"
LORA = f"{EPOCHS} --lora_rank 16 --lora_alpha 32 --learning_rate 1e-2"
METHODS = {
    "all weights": f"{EPOCHS} --learning_rate 2e-3",
    "LoRA": LORA,
    "QLoRA": f"{LORA} --load_in_4bit",
}
COLUMNS = (
    "loss before training", "after training", "MB of linear layers", "MB of all weights", "MB trained",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("output/qlora"))
    options = parser.parse_args()
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name in METHODS:
        losses = [run(name, seed, options) for seed in options.seeds]
        cells = [spread(column) for column in zip(*losses, strict=True)]
        cells += [f"{size / 1e6:.3f}" for size in sizes(name, options.model)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def run(name: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Held-out loss in nats per token before and after training, in a run that is made unless it is there."""
    output = options.output / f"{name.replace(' ', '_')}_{seed}"
    if not (output / "final/config.json").exists():
        words = f"{SETTINGS} {METHODS[name]} --seed {seed}".split()
        command = [sys.executable, "-m", "step1_sft.main", *words, "--output_dir", str(output)]
        command += ["--model_name_or_path", options.model, "--train_data", options.data]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": path
        }  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"qlora.py: {output}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line["eval/loss"] for line in lines if "eval/loss" in line]
    return before, after


def sizes(name: str, path: str) -> tuple[int, int, int]:
    """Bytes of the linear layers but the head, of all weights without adapters, and of what is trained."""
    from common.model.loading import load_causal_lm
    from common.model.lora import add_adapters
    from common.model.nf4 import linear_layers, nbytes
    from common.runtime.option_parser import parse_options
    from common.text.tokenizer import load_tokenizer
    from step1_sft.options import SFTOptions

    options = parse_options(SFTOptions, METHODS[name].split(), check_required=False)
    model = load_causal_lm(path, load_tokenizer(path), None)
    others = nbytes(model) - sum(layer.weight.nbytes for layer in linear_layers(model).values())
    adapted = add_adapters(model, options, seed=0)
    trained = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    weights = nbytes(adapted) - trained * (options.lora_rank > 0)
    return weights - others, weights, trained


def spread(values: tuple[float, ...]) -> str:
    """Mean of the seeds, and their standard deviation if there are several."""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
