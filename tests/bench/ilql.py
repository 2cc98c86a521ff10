"""ILQL on random letters: what the weight of Q in decoding (--ilql_beta) does to the score.

    OMP_NUM_THREADS=1 nice -n 10 python tests/bench/ilql.py --output /tmp/ilql_bench [--seed 0]

A response is eight random letters, of ten; its score is the number of `a` less that of `b`. Only the scores
of 1,000 responses show which letters matter. Prints a Markdown table; takes a minute.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LETTERS, BETAS = "abcdefghij", (0, 1, 2, 4, 8)
TRAINING = (
    "--global_batch_size 32 --micro_batch_size 32 --learning_rate 1e-2 --max_steps 300 --save_steps 0"
    " --gamma 1 --alpha 0.5 --steps_for_target_q_sync 1"
)


def score(prompts: Sequence, responses: Sequence[str], records: Sequence[dict]) -> list[float]:  # noqa: ARG001 - as step 3 calls it
    """The number of `a` less that of `b`."""
    return [float(text.count("a") - text.count("b")) for text in responses]


def main() -> None:
    from tests.ranks import succeed
    from tests.recomputed.tiny import write_models, write_records

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, draw = arguments.output, random.Random(arguments.seed)
    folder.mkdir(parents=True)
    write_models(folder)
    texts = ["".join(draw.choices(LETTERS, k=11)) for _ in range(1000)]
    scores = score([], [text[3:] for text in texts], [])
    scored = zip(texts, scores, strict=True)
    rows = [{"prompt": text[:3], "response": text[3:], "score": one} for text, one in scored]
    data = write_records(folder / "scored.jsonl", rows)
    prompts = write_records(folder / "prompts.jsonl", rows[:200])
    words = ["--model_name_or_path", str(folder / "model"), "--train_data", data, *TRAINING.split()]
    succeed("step2_reward.ilql.main", [*words, "--output_dir", str(folder / "out")], folder)
    print("| --ilql_beta | score |\n|---|---|")
    for beta in BETAS:
        report = folder / f"beta_{beta}"
        words = ["--model_name_or_path", str(folder / "out/final"), "--eval_data", prompts]
        words += ["--gold_function", f"{__file__}:score", "--max_response_length", "12"]
        words += ["--ilql_beta", str(beta), "--output_dir", str(report)]
        succeed("step3_ppo.compare.main", words, folder)
        (policy,) = json.loads((report / "report.json").read_text())["policies"]
        mean = policy["scores"]["gold score"]
        print(f"| {beta} | {mean['mean']:.2f} ± {(mean['high'] - mean['low']) / 2:.2f} |")


if __name__ == "__main__":
    main()
