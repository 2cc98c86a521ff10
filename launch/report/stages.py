"""Commands that write options.json, recognised by their options."""

import dataclasses
from functools import cache
from typing import Any, NamedTuple

Known = dict[str, tuple[Any, str]]  # default and help of every option, by name
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
    from step1_sft.options import CritiqueOptions, SFTOptions
    from step2_reward.annotate.options import SamplePairsOptions
    from step2_reward.direct.options import DirectOptions
    from step2_reward.judge.options import JudgeOptions
    from step2_reward.options import RewardOptions
    from step3_ppo.best_of_n.options import SampleOptions
    from step3_ppo.options import PPOOptions

    return [
        Stage("sft", "Step 1: supervised fine-tuning", _defaults(SFTOptions()), trains=True),
        Stage("reward", "Step 2: reward model", _defaults(RewardOptions()), trains=True),
        Stage("direct", "Step 2: direct preference optimisation", _defaults(DirectOptions()), trains=True),
        Stage("ppo", "Step 3: PPO", _defaults(PPOOptions()), trains=True),
        Stage("best_of_n", "Best of n", _defaults(SampleOptions()), trains=False),
        Stage("judge", "Judge", _defaults(JudgeOptions()), trains=False),
        Stage("critique", "critique", _defaults(CritiqueOptions()), trains=False),
        Stage("sample_pairs", "sampled pairs", _defaults(SamplePairsOptions()), trains=False),
    ]


def _defaults(options: Any) -> Known:
    fields = dataclasses.fields(options)
    return {field.name: (getattr(options, field.name), field.metadata["help"]) for field in fields}
