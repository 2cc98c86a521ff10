"""Commands that write options.json, recognised by their options."""

import dataclasses
from functools import cache
from pkgutil import resolve_name
from typing import Any, NamedTuple

Known = dict[str, tuple[Any, str]]  # default and help of every option, by name
# Name, title and options class of each command, and whether it trains.
ALL = [
    ("sft", "Step 1: supervised fine-tuning", "step1_sft.options.SFTOptions", True),
    ("reward", "Step 2: reward model", "step2_reward.options.RewardOptions", True),
    ("direct", "Step 2: direct preference optimisation", "step2_reward.direct.options.DirectOptions", True),
    ("ilql", "Step 2: ILQL", "step2_reward.ilql.options.ILQLOptions", True),
    (
        "process",
        "Step 2: process reward model",
        "step2_reward.process.options.ProcessRewardOptions",
        True,
    ),
    ("ppo", "Step 3: PPO", "step3_ppo.options.PPOOptions", True),
    ("ppo", "Step 3: PPO with a limit on cost", "step3_ppo.safe.options.SafeOptions", True),
    ("best_of_n", "Best of n", "step3_ppo.best_of_n.options.SampleOptions", False),
    ("judge", "Judge", "step2_reward.judge.options.JudgeOptions", False),
    ("critique", "critique", "step1_sft.options.CritiqueOptions", False),
    ("sample_pairs", "sampled pairs", "step2_reward.annotate.options.SamplePairsOptions", False),
]
LEAST_KNOWN = 0.5  # share of the options in options.json that a command must have


class Stage(NamedTuple):
    """A command that writes options.json."""

    name: str
    title: str
    known: Known
    trains: bool


def stage_of(options: dict[str, Any]) -> Stage | None:
    """The command with these options, or the closest one: the run may come from another version."""
    candidates = [s for s in stages() if len(s.known.keys() & options.keys()) > LEAST_KNOWN * len(options)]
    return min(candidates, key=lambda stage: len(stage.known.keys() ^ options.keys()), default=None)


@cache
def stages() -> list[Stage]:
    """All commands that write options.json."""
    return [Stage(name, title, _defaults(resolve_name(path)()), trains) for name, title, path, trains in ALL]


def _defaults(options: Any) -> Known:
    fields = dataclasses.fields(options)
    return {field.name: (getattr(options, field.name), field.metadata["help"]) for field in fields}
