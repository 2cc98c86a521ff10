"""The largest phase of each step, and the options that shorten it most."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.predict import GIB
from launch.plan.remedies import Changes, Predictor
from launch.plan.step_seconds import Step, step_seconds
from launch.plan.time_table import PHASES

LEAST_GAIN = 0.02  # of a step's seconds, below which a change is not worth a line
MOST_DOUBLINGS = 6


class Change(NamedTuple):
    """An option that may shorten a phase."""

    text: str
    changes: Changes
    note: str = ""  # for an option that changes the result of training


def changes(options: PlanOptions) -> Iterator[Change]:
    """All of them. Options that have the value already change nothing."""
    for name in ("gradient_checkpointing", "offload_frozen", "offload_states"):
        yield Change(f"without --{name}", {one: False for one in vars(options) if one.endswith(name)})
    yield Change("--gather_for_generation true", {"gather_for_generation": True})
    yield Change("--compile_generation auto", {"compile_generation": "auto"})
    engine, ranks = "rollout_engine", "rollout_tensor_parallel"
    for size in (1, *doublings(1, min(options.gpus_per_node, options.num_gpus))):
        if options.num_gpus % size == 0:
            yield Change(f"--{engine} vllm --{ranks} {size}", {engine: "vllm", ranks: size})
    for name in ("zero1", "zero2", *["zero3"] * (not options.load_in_4bit)):
        path = f"common/zero_configs/{name}.json"
        of_models = {"actor_zero_config": "", "critic_zero_config": ""}
        yield Change(f"--zero_config {path}", {"zero_config": path, **of_models})
    rows = options.rollout_batch_size // options.num_gpus
    of_update = options.global_batch_size // options.num_gpus
    by_tokens = options.micro_batch_tokens > 0
    for name, most in (
        ("generation_batch_size", rows),
        ("micro_batch_tokens", options.micro_batch_tokens << MOST_DOUBLINGS) if by_tokens
        else ("micro_batch_size", of_update),
    ):  # fmt: skip
        for size in doublings(getattr(options, name), most):
            yield Change(f"--{name} {size}", {name: size})
    yield Change("--ppo_epochs 1", {"ppo_epochs": 1}, "fewer updates per rollout")


def doublings(size: int, most: int) -> list[int]:
    """The size times 2, 4, 8 ... up to `most`."""
    return [size << n for n in range(1, MOST_DOUBLINGS) if size << n <= most]


def advice(options: PlanOptions, steps: dict[str, Step], room: float, predictor: Predictor) -> Iterator[str]:
    """A line per step: its largest phase, and the fastest change that shortens it and fits in `room` GiB."""
    tried = [(change, step_seconds(replace(options, **change.changes))) for change in changes(options)]

    def fits(change: Change, step: str) -> bool:
        peaks = (total(predictor(made)[step].parts) / GIB for made in (change.changes, {}))
        return next(peaks) <= max(room, next(peaks))

    for step, (seconds, _) in steps.items():
        phase, longest = seconds.most_common(1)[0]
        faster = [
            (after[step].seconds.total(), change)
            for change, after in tried
            if after[step].seconds[phase] < longest
            and after[step].seconds.total() < (1 - LEAST_GAIN) * seconds.total()
        ]
        faster.sort(key=lambda way: way[0])
        best = [
            next((way for way in faster if bool(way[1].note) is noted and fits(way[1], step)), None)
            for noted in (False, True)
        ]
        ways = [
            f"{change.text}: {after:.1f} s" + f" ({change.note})" * bool(change.note)
            for after, change in filter(None, best)
        ]
        share = f"{longest / seconds.total():.0%} of {seconds.total():.1f} s"
        yield f"  {step}: {PHASES[phase]}, {share}; {' or '.join(ways) or 'no option shortens it'}"
