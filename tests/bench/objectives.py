"""A reward model and a function of another scale: what --normalise_scores makes of their weights.

    bash launch/quickstart.sh
    python tests/bench/objectives.py [--seeds 0 1 2] [--only each ...]
    bash launch/report.sh output/quickstart/short_runs/objectives

The function takes off for every word. It is given in hundreds of words and in words, 100 times as large, with
the same weight; and with several weights. Runs that are there already are only read.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
MODES = ("off", "sum", "each")
WEIGHTS = (0.25, 0.5, 1)
WEIGHT = 0.5  # at which both scales are compared
COLUMNS = ("score of the reward model", "words", "gold", "KL")


def words(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:  # noqa: ARG001
    return [-float(len(response.split())) for response in responses]


def hundreds(prompts: list[Any], responses: list[str], records: list[dict]) -> list[float]:
    return [score / 100 for score in words(prompts, responses, records)]


def figures(mode: str, function: str, weight: float, seed: int, quickstart: Path) -> list[float]:
    """The held-out figures of one run at its end, by COLUMNS."""
    from quickstart_runs import last, run

    options = (
        f"--normalise_scores {mode} --reward_function {__file__}:{function}:{weight}"
        " --advantage_estimator rloo --samples_per_prompt 4"
    )
    lines = run(f"objectives/{mode}_{function}_{weight:g}", seed, options, quickstart)
    count = -last(lines, f"eval/score_{function}") * {"words": 1, "hundreds": 100}[function]
    return [last(lines, "eval/score_1"), count, last(lines, "eval/gold"), last(lines, "eval/kl")]


def main() -> None:
    from quickstart_runs import parse, spread

    options = parse(__doc__, MODES)
    cases = [(mode, function, WEIGHT) for mode in options.only for function in ("hundreds", "words")]
    cases += [("each", "words", weight) for weight in WEIGHTS if weight != WEIGHT and "each" in options.only]
    print(f"| `--normalise_scores` | function | weight | {' | '.join(COLUMNS)} |\n|{'---|' * 7}")
    for mode, function, weight in cases:
        rows = [figures(mode, function, weight, seed, options.quickstart) for seed in options.seeds]
        cells = [spread(column) for column in zip(*rows, strict=True)]
        print(f"| {mode} | {function} | {weight:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
