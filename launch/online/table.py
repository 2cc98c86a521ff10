"""The rounds of launch/online.sh as a table, and in rounds.jsonl and rounds.png.

python launch/online/table.py --output_dir OUTPUT

The sign of distribution shift is a reward model that is right less often about responses of the policy that
was trained against it (`former_accuracy`) than about held-out pairs like its own (`accuracy` of the round
before). Policies are scored by the reward model of the last round. What is not measured yet is missing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.data.journal import to_lines
from common.runtime.damaged_jsonl import read_metrics
from common.runtime.distributed import log
from common.runtime.files import naming, write_text
from common.runtime.option_parser import parse_options
from common.runtime.process import run_main
from launch.online.options import RoundsOptions
from step3_ppo.compare.report import COLOURS

HEADS = {
    "round": "round",
    "pairs": "new pairs",
    "former_accuracy": "former reward model, new pairs",
    "accuracy": "reward model, held out",
    "score": "score",
    "gold": "gold score",
    "kl": "KL to MODEL, nats",
}


@dataclass(frozen=True)
class Round:
    """Figures of a round; round 0 is the policy that the first one samples from."""

    round: int
    pairs: int | None = None  # labelled in this round
    former_accuracy: float | None = None  # of the reward model of the round before, on these pairs
    accuracy: float | None = None  # of this round's reward model, on held-out pairs of all rounds so far
    score: float | None = None  # of this round's policy on held-out prompts
    gold: float | None = None
    kl: float | None = None


def main() -> None:
    folder = Path(parse_options(RoundsOptions).output_dir)
    policies = _read(folder / "report/report.json").get("policies", [])
    count = sum(1 for _ in folder.glob("round_*/labels/preferences.jsonl"))
    figures = [policy_figures(policy) for policy in policies]
    figures += [{}] * (count + 1 - len(figures))
    rounds = [
        Round(number, **(round_figures(folder, number) if number else {}), **figures[number])
        for number in range(count + 1)
    ]
    write_text(folder / "rounds.jsonl", to_lines(map(asdict, rounds)))
    with naming(folder / "rounds.png"):
        plot(rounds).savefig(folder / "rounds.png", dpi=150)
    log(f"\n{table(rounds)}\nrounds.jsonl and rounds.png: {folder}\n")


def round_figures(folder: Path, number: int) -> dict[str, Any]:
    """Figures of the pairs and the reward model of a round."""
    here = folder / f"round_{number}"
    shift = _read(here / "shift/report.json").get("accuracy", {})
    lines, _ = read_metrics(here / "step2_reward/metrics.jsonl")
    measured = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    with (here / "labels/preferences.jsonl").open("rb") as labels:
        pairs = sum(1 for _ in labels)
    return {
        "pairs": pairs,
        "former_accuracy": shift.get("accuracy"),
        "accuracy": measured[-1] if measured else None,
    }


def policy_figures(policy: dict[str, Any]) -> dict[str, Any]:
    """Figures of a policy in the comparison."""
    scores = policy["scores"]
    gold = scores["gold score"]["mean"] if "gold score" in scores else None
    return {"score": scores["reward model"]["mean"], "gold": gold, "kl": policy["kl"]["mean"]}


def table(rounds: Sequence[Round]) -> str:
    """A table in Markdown."""
    lines = [[*HEADS.values()], ["---"] * len(HEADS)]
    lines += [[_cell(getattr(one, name)) for name in HEADS] for one in rounds]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rounds: Sequence[Round]) -> Any:
    """Accuracy of the reward models, and the scores of the policies, over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    panels = {"Reward model: accuracy": ("former_accuracy", "accuracy"), "Policy": ("score", "gold")}
    for axes, (title, names) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            points = [(one.round, getattr(one, name)) for one in rounds if getattr(one, name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=HEADS[name])
                axes.legend(frameon=False)
        axes.set(title=title, xlabel="round", xticks=[one.round for one in rounds])
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _cell(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    run_main(main)
