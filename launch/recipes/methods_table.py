"""Table of the methods of stories_methods.sh: results on held-out prompts, and costs.

python launch/recipes/methods_table.py OUTPUT
"""

import json
import sys
from pathlib import Path

HEADS = ("method", "gold score", "KL", "distinct-2", "perplexity", "seconds", "sampled tokens")


def sampled_tokens(folder: Path) -> int:
    """Number of response tokens that the runs below a folder sampled for training."""
    total = 0.0
    for file in folder.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        rows = json.loads(file.with_name("options.json").read_text()).get("rollout_batch_size", 0)
        total += sum(line["response/length"] * rows for line in lines if "response/length" in line)
    for file in folder.rglob("samples/samples.jsonl"):
        total += sum(json.loads(line)["length"] for line in file.read_text().splitlines())
    return round(total)


def seconds(output: Path, folder: Path) -> int:
    """Wall-clock time of all commands that wrote below a folder, without the report of its rounds."""
    lines = [line.split(" ", 1) for line in (output / "times.txt").read_text().splitlines()]
    runs = [(int(spent), Path(path)) for spent, path in lines if path and Path(path).name != "report"]
    return sum(spent for spent, path in runs if path.is_relative_to(folder))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python launch/recipes/methods_table.py OUTPUT")
    output = Path(sys.argv[1])
    for name in ("times.txt", "report/report.json"):
        if not (output / name).is_file():
            sys.exit(f"error: {output / name} is missing; has stories_methods.sh finished?")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for policy in json.loads((output / "report" / "report.json").read_text())["policies"]:
        folder = Path(policy["model"]).parent
        gold = policy["scores"]["gold score"]
        cells = [
            folder.name,
            f"{gold['mean']:.3f} ± {(gold['high'] - gold['low']) / 2:.3f}",
            f"{policy['kl']['mean']:.2f}",
            f"{policy['distinct_2']:.3f}",
            f"{policy['perplexity']:.2f}",
            f"{seconds(output, folder)}",
            f"{sampled_tokens(folder):,}",
        ]
        print(f"| {' | '.join(cells)} |")
    shared = seconds(output, output / "step2_reward")
    print(f"\nThe reward model took {shared} s; dpo, ipo, kto, orpo, simpo and ilql do not need it.")


if __name__ == "__main__":
    main()
