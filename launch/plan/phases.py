"""The moments of each step at which most memory is in use, and what is in it. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from launch.plan.memory import (
    Model,
    Parts,
    activations,
    buffers_of_reduction,
    copies_in_step,
    gathered,
    gradients,
    kv_cache,
    logits_in_drawing,
    logits_in_reading,
    logits_in_training,
    optimiser,
    passing,
    total,
    weights,
)


class Phase(NamedTuple):
    """A moment of a step, and the memory in use then."""

    name: str
    parts: Parts


@dataclass(frozen=True)
class Sizes:
    """How much goes through a model at once on one rank."""

    micro_batch: int
    accumulates: bool  # a step has more than one micro-batch
    checkpointing: bool
    length: int  # of a row in steps 1 and 2
    prompt: int
    response: int
    generated: int  # rows that step 3 generates or scores at once
    gathers: bool  # --gather_for_generation


def peak(phases: Iterator[Phase]) -> Phase:
    """The phase that decides whether it fits."""
    return max(phases, key=lambda phase: total(phase.parts))


def step1(policy: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """Every row full, and every token of it trained."""
    rows, width = sizes.micro_batch, sizes.length
    forward = Parts(
        activations=activations(policy, rows, width, sizes.checkpointing),
        logits=logits_in_training(policy, rows * width),
    )
    yield from training(policy, fixed + weights(policy) + optimiser(policy), forward, sizes)


def step2(reward: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """Chosen and rejected of a pair in rows of their own, both full."""
    rows, width = 2 * sizes.micro_batch, sizes.length
    forward = Parts(activations=activations(reward, rows, width, sizes.checkpointing))
    yield from training(reward, fixed + weights(reward) + optimiser(reward), forward, sizes)


def step3(
    actor: Model, critic: Model | None, reference: Model | None, rewards: list[Model], sizes: Sizes,
    fixed: Parts,
) -> Iterator[Phase]:  # fmt: skip
    """Every prompt and response full. reference: none where it is the actor without its adapter; rewards:
    none where the critic's backbone does.
    """
    trained = [actor, critic] if critic else [actor]
    # Several reward models wait on the host, and each is on the GPU for its pass only.
    waits = len(rewards) > 1 and rewards[0].zero.stage < 3 and not rewards[0].zero.on_cpu
    present = [*trained, *([reference] if reference else []), *([] if waits else rewards)]
    held = sum((weights(model) for model in present), fixed)
    held = sum((optimiser(model) for model in trained), held)
    held["host"] += waits * sum(total(weights(model)) for model in rewards)
    idle = sum((gradients(model) for model in trained if model.zero.stage == 3), held)

    rows, width = sizes.generated, sizes.prompt + sizes.response
    whole = actor.zero.size * actor.shape.parameters if sizes.gathers else gathered(actor)
    drawing = Parts({"KV cache": kv_cache(actor, rows, width)})
    drawing["buffers"] = whole if gathered(actor) else 0
    drawing += Parts(activations=passing(actor, rows, sizes.prompt), logits=logits_in_drawing(actor, rows))
    yield Phase("rollout", idle + drawing)
    readers = [reference or actor, *rewards, *([critic] if critic else [])]
    for number, model in enumerate(readers):
        reading = Parts(activations=passing(model, rows, width), buffers=gathered(model))
        reading["logits"] = 0 if number else logits_in_reading(model, rows * sizes.response)
        yield Phase("scoring", idle + reading + (weights(model) if waits and model in rewards else Parts()))

    rows = sizes.micro_batch
    values = Parts(activations=activations(critic, rows, width, sizes.checkpointing)) if critic else Parts()
    policy = Parts(
        activations=activations(actor, rows, width, sizes.checkpointing),
        logits=logits_in_training(actor, rows * sizes.response),
    )
    for model, forward, other in ((actor, policy + values, critic), (critic, values, actor)):
        if model:
            # The critic's first pass is made in scoring, and waits until the actor has had its own.
            keeps = other and (other.zero.stage == 3 or (sizes.accumulates and model is actor))
            beside = gradients(other) if keeps else Parts()
            yield from training(model, held + beside, forward, sizes)


def training(model: Model, held: Parts, forward: Parts, sizes: Sizes) -> Iterator[Phase]:
    """A backward pass from beginning to end, and the optimiser step after it."""
    zero, grads = model.zero, gradients(model)
    before = grads if sizes.accumulates or zero.stage == 3 else Parts()
    present = Parts(buffers=gathered(model))
    reserved = 0 if zero.on_cpu or zero.stage == 0 else buffers_of_reduction(model)
    yield Phase("backward begins", held + before + present + forward + Parts(buffers=reserved))
    # Stage 2 keeps the sum of earlier micro-batches apart from the gradients of the running one.
    after = before + grads if zero.stage == 2 else grads
    yield Phase("backward ends", held + after + present + Parts(buffers=buffers_of_reduction(model)))
    yield Phase("optimiser step", held + grads + Parts(buffers=copies_in_step(model)))
