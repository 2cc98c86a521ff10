"""Memory of long rows in step 1 that two ranks share (`--sequence_parallel 2`), beside a row on each rank.

    python tests/bench/sequence_parallel.py --output /tmp/sequence_parallel [--lengths 2048 4096]

A random Llama with 5.0 million parameters, 4 rows of full length per step, one row per micro-batch, 3 steps,
two ranks on the CPU. Prints peak memory of a rank, seconds of the last step and the losses.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from quickstart_runs import last, read
from transformers import LlamaConfig, LlamaForCausalLM

import tests.conftest  # noqa: F401 - the CPU, one thread
from tests.ranks import succeed
from tests.stages import ZERO, make_world

SETTINGS = (
    "--global_batch_size 4 --micro_batch_size 1 --max_steps 3 --learning_rate 1e-3 --eval_fraction 0"
    " --logging_steps 1 --num_samples 0 --save_steps 0 --overlong truncate_response"
    f" --zero_config {ZERO}/zero0.json"
)


def run(folder: Path, length: int, shared: int) -> list[dict[str, float]]:
    """Metrics of each step."""
    output = folder / f"shared_{shared}_{length}"
    paths = {"model_name_or_path": "world/model", "train_data": f"{length}.jsonl", "output_dir": output.name}
    words = f"{SETTINGS} --max_length {length} --sequence_parallel {shared}".split()
    for name, path in paths.items():
        words += [f"--{name}", str(folder / path)]
    succeed("step1_sft.main", words, folder / "logs", ranks=2)
    return read(output / "metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    options = parser.parse_args()
    world = options.output / "world"
    if not world.exists():
        make_world(world)
        config = LlamaConfig.from_pretrained(world / "model").to_dict()
        sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "head_dim": 32}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 8192}
        LlamaForCausalLM(LlamaConfig(**config | sizes | heads)).save_pretrained(world / "model")
    print("| tokens of a row | ranks that share it | peak memory of a rank, GiB | s/step | losses |")
    print(f"|{'---|' * 5}")
    for length in options.lengths:
        record = {"prompt": "Hello!", "completion": "Lemons are there. " * length}
        (options.output / f"{length}.jsonl").write_text(f"{json.dumps(record)}\n" * 12)
        for shared in (1, 2):
            lines = run(options.output, length, shared)
            losses = " ".join(f"{line['train/loss']:.5f}" for line in lines if "train/loss" in line)
            figures = f"{last(lines, 'memory/peak_gib'):.2f} | {last(lines, 'time/step'):.1f}"
            print(f"| {length} | {shared} | {figures} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
