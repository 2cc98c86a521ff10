"""Options, single or combined, that make a step fit, fastest first."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from common.model.zero import CONFIG_FOLDER
from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.phases import Phase
from launch.plan.predict import GIB, predict, read_models

Changes = dict[str, Any]  # options by name
Predictor = Callable[[Changes], dict[str, Phase]]
MOST_TOGETHER = 4  # remedies per combination
MOST_WAYS = 10  # shown per step
HALVINGS = 12
BELOW_STAGE_3 = "below stage 3"


class Remedy(NamedTuple):
    """An option that lowers the peak, at one or more levels, mildest first."""

    levels: list[Changes]
    slowness: float  # rule of thumb: time added to a step, as a share; only the order matters
    note: str = ""  # for an option that changes the result of training
    kind: str = ""  # a combination has at most one remedy of a kind
    steps: str = "step 1, step 2, step 3"


class Way(NamedTuple):
    """Options to add to the command of a step, and its memory with them."""

    options: str
    peak: float  # GiB of the device
    host: float  # GiB of host memory, per rank
    notes: list[str]


def _zero(name: str, slowness: float) -> Remedy:
    path = str(CONFIG_FOLDER / f"{name}.json")
    changes = {"zero_config": path, "actor_zero_config": "", "critic_zero_config": ""}
    return Remedy([changes], slowness, kind="zero")


FULL_OFFLOAD = _zero("zero3_offload", 2.0)  # the ZeRO configuration with the least memory


def remedies(options: PlanOptions) -> list[Remedy]:
    """All remedies. Options that are on already change nothing, so `ways` never returns them."""
    rollout = min(options.generation_batch_size, -(-options.rollout_batch_size // options.num_gpus))
    size = "micro_batch_tokens" if options.micro_batch_tokens else "micro_batch_size"
    checkpointing: Changes = {"gradient_checkpointing": True}
    without_critic: Changes = {"advantage_estimator": "rloo"}
    if options.samples_per_prompt == 1:
        without_critic["samples_per_prompt"] = 4 if options.rollout_batch_size % 4 == 0 else 2
    every = [
        Remedy([{"gather_for_generation": False}], 0.02, steps="step 1"),
        Remedy(_levels(size, _halves(getattr(options, size))), 0.05),
        Remedy(_levels("generation_batch_size", _halves(rollout)), 0.06, steps="step 3"),
        Remedy([{"offload_frozen": True}], 0.07, steps="step 3"),
        _zero("zero2", 0.08),
        Remedy([{"offload_states": True}], 0.1, kind=BELOW_STAGE_3, steps="step 3"),
        _zero("zero3", 0.15),
        Remedy([checkpointing], 0.3, steps="step 1, step 2"),
        Remedy([{"critic_gradient_checkpointing": True}, checkpointing], 0.3, steps="step 3"),
        _zero("zero2_offload", 1.0),
        FULL_OFFLOAD,
        Remedy([{"gather_for_generation": False}], 4.0, steps="step 3"),
        Remedy(
            [without_critic] * (not options.has_costs), 0.0, "no critic: another algorithm", steps="step 3"
        ),
        Remedy([{"lora_rank": 16}], 0.01, "trains adapters only"),
        Remedy(_four_bits(options), 0.3, "rounds frozen weights to 4 bits", kind="zero"),
        Remedy(_engines(options), 0.0, "needs vLLM", steps="step 3"),
    ]
    return [remedy for remedy in every if remedy.kind != "zero" or not options.load_in_4bit]


def _four_bits(options: PlanOptions) -> list[Changes]:
    """Frozen weights in 4 bits, under adapters and below stage 3."""
    if not options.lora_rank:
        return []
    models = read_models(options)
    trained = [models.policy, models.actor, *([models.critic] if models.critic else [])]
    return [] if any(model.zero.stage == 3 for model in trained) else [{"load_in_4bit": True}]


def _engines(options: PlanOptions) -> list[Changes]:
    """vLLM, with its weights on more and more of a machine's ranks."""
    if options.top_k or options.top_p < 1.0:
        return []
    ranks = min(options.num_gpus, options.gpus_per_node)
    parallel = [size for size in (2, 4, 8) if ranks % size == 0]
    engine = {"rollout_engine": "vllm"}
    return [engine, *(engine | {"rollout_tensor_parallel": size} for size in parallel)]


def ways(options: PlanOptions, step: str, room: float, predictor: Predictor) -> list[Way]:
    """Smallest sets of remedies that lower the peak of a step to `room` GiB.

    Sets that change only speed and memory come first; within each group, the fastest first.
    """
    usable = [remedy for remedy in remedies(options) if step in remedy.steps and remedy.levels]

    def fits(levels: Sequence[Changes]) -> bool:
        return total(predictor(_merged(levels))[step].parts) / GIB <= room

    smallest = _smallest([remedy for remedy in usable if not remedy.note], fits)
    if len(smallest) < MOST_WAYS:  # else those that change results are not shown
        smallest = _smallest(usable, fits)
    smallest.sort(key=lambda chosen: (any(r.note for r in chosen), sum(r.slowness for r in chosen)))
    return [_way(chosen, _mildest(chosen, fits), options, step, predictor) for chosen in smallest[:MOST_WAYS]]


def _smallest(
    usable: Sequence[Remedy], fits: Callable[[Sequence[Changes]], bool]
) -> list[tuple[Remedy, ...]]:
    """Minimal sets that fit: without any one of its remedies, a set does not."""
    smallest: list[tuple[Remedy, ...]] = []
    for count in range(1, MOST_TOGETHER + 1):
        for chosen in combinations(usable, count):
            kinds = [remedy.kind for remedy in chosen if remedy.kind]
            is_larger = any(all(one in chosen for one in smaller) for smaller in smallest)
            if not is_larger and len(set(kinds)) == len(kinds) and fits([one.levels[-1] for one in chosen]):
                smallest.append(chosen)
    return smallest


def least(options: PlanOptions, step: str, predictor: Predictor) -> Way:
    """All remedies together that change only speed and memory: the minimum of a step."""
    usable = [remedy for remedy in remedies(options) if step in remedy.steps and not remedy.note]
    without = FULL_OFFLOAD.kind, BELOW_STAGE_3
    chosen = [remedy for remedy in usable if remedy.levels and remedy.kind not in without]
    chosen += [] if options.load_in_4bit else [FULL_OFFLOAD]
    return _way(chosen, [remedy.levels[-1] for remedy in chosen], options, step, predictor)


def cached(options: PlanOptions) -> Predictor:
    """`predict` as a function of changes to the options, with a cache."""
    results: dict[str, dict[str, Phase]] = {}

    def predictor(changes: Changes) -> dict[str, Phase]:
        key = repr(sorted(changes.items()))
        if key not in results:
            results[key] = predict(replace(options, **changes))
        return results[key]

    return predictor


def _levels(name: str, sizes: Sequence[int]) -> list[Changes]:
    return [{name: size} for size in sizes]


def _halves(size: int) -> list[int]:
    """Halves, quarters ... as long as they are integers, so that batches stay divisible."""
    return [size >> n for n in range(1, HALVINGS) if size >> n and (size >> n) << n == size]


def _merged(levels: Sequence[Changes]) -> Changes:
    return {name: value for level in levels for name, value in level.items()}


def _mildest(chosen: Sequence[Remedy], fits: Callable[[Sequence[Changes]], bool]) -> list[Changes]:
    """The level of each remedy: in turn, the mildest one that still fits with the others."""
    levels = [remedy.levels[-1] for remedy in chosen]
    for index, remedy in enumerate(chosen):
        candidates = ([*levels[:index], level, *levels[index + 1 :]] for level in remedy.levels)
        levels = next(filter(fits, candidates))
    return levels


def _way(
    chosen: Sequence[Remedy], levels: list[Changes], options: PlanOptions, step: str, predictor: Predictor
) -> Way:
    phase = predictor(_merged(levels))[step]
    words = " ".join(word for level in levels for word in _words(level, options, step))
    notes = [remedy.note for remedy in chosen if remedy.note]
    return Way(words, total(phase.parts) / GIB, phase.parts["host"] / GIB, notes)


def _words(changes: Changes, options: PlanOptions, step: str) -> Iterator[str]:
    """Changes as words of the command line."""
    for name, value in changes.items():
        if name == "zero_config":
            per_model = [f"{model}_zero_config" for model in ("actor", "critic")]
            is_set = step == "step 3" and any(getattr(options, one) for one in per_model)
            names = per_model if is_set else [name]
            yield from (f"--{one} {_short(value)}" for one in names)
        elif value is True:
            yield f"--{name}"
        elif value != "":
            yield f"--{name} {str(value).lower()}"


def _short(path: str) -> str:
    """Path relative to the working directory if it is below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
