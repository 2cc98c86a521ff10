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
    drawable,
    gathered,
    gradient_of_logits,
    gradients,
    in_layer,
    kv_cache,
    logits,
    logits_in_drawing,
    logits_in_reading,
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
    checkpointing: bool  # in steps 1 and 2
    actor_checkpointing: bool
    critic_checkpointing: bool
    length: int  # of a row in steps 1 and 2
    prompt: int
    response: int
    generated: int  # rows that step 3 generates or scores at once
    remembered: int  # rows of a rollout of which every rank knows which tokens could be drawn
    gathers: bool  # --gather_for_generation


class Forward(NamedTuple):
    """What a forward pass leaves to the backward pass, and what that takes besides."""

    kept: Parts
    loss: float = 0.0  # at its beginning
    layer: float = 0.0  # recomputed, one at a time


def peak(phases: Iterator[Phase]) -> Phase:
    """The phase that decides whether it fits."""
    return max(phases, key=lambda phase: total(phase.parts))


def step1(policy: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """Every row full, and every token of it trained."""
    rows, width = sizes.micro_batch, sizes.length
    forward = passed(policy, rows, width, sizes.checkpointing, rows * width)
    yield from training(policy, fixed + weights(policy) + optimiser(policy), forward, sizes.accumulates)


def step2(reward: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """Chosen and rejected of a pair in rows of their own, both full."""
    rows, width = 2 * sizes.micro_batch, sizes.length
    forward = passed(reward, rows, width, sizes.checkpointing)
    yield from training(reward, fixed + weights(reward) + optimiser(reward), forward, sizes.accumulates)


def step3(
    actor: Model, critic: Model | None, reference: Model | None, rewards: list[Model], sizes: Sizes,
    fixed: Parts,
) -> Iterator[Phase]:  # fmt: skip
    """Every prompt and response full. reference: none where it is the actor without its adapter; rewards:
    none where the critic's backbone does.
    """
    trained = [actor, critic] if critic else [actor]
    held = sum((weights(model) for model in [*trained, *rewards]), fixed)
    held = sum((optimiser(model) for model in trained), held)
    if reference:
        held += weights(reference)
    held["token masks"] += drawable(actor, sizes.remembered * sizes.response)
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
        yield Phase("scoring", idle + reading)
    yield from updates(actor, critic, held, sizes, has_adapters=reference is None)


def updates(
    actor: Model, critic: Model | None, held: Parts, sizes: Sizes, has_adapters: bool
) -> Iterator[Phase]:
    """Passes over micro-batches of a rollout, beside what is held all the time.

    The critic's first pass is made in scoring, and waits until the actor has had its own; there are no
    gradients then. Later the models take turns.
    """
    rows, width = sizes.micro_batch, sizes.prompt + sizes.response
    policy = passed(actor, rows, width, sizes.actor_checkpointing, rows * sizes.response)
    values = passed(critic, rows, width, sizes.critic_checkpointing) if critic else Forward(Parts())

    def beside(other: Model | None, accumulates: bool) -> Parts:
        return gradients(other) if other and (accumulates or other.zero.stage == 3) else Parts()

    waiting = held + values.kept + beside(critic, False)
    # In the pass before, the adapter was off.
    yield from training(actor, waiting, policy, accumulates=False, is_known=not has_adapters)
    for model, other, forward in ((actor, critic, policy), (critic, actor, values)):
        if model:
            added = held + beside(other, sizes.accumulates)
            yield from training(model, added, forward, sizes.accumulates)


def passed(model: Model, rows: int, width: int, checkpointing: bool, positions: int = 0) -> Forward:
    """A forward pass over rows x width tokens, with logits at some positions."""
    kept = Parts(activations=activations(model, rows, width, checkpointing), logits=logits(model, positions))
    layer = in_layer(model, rows, width) if checkpointing else 0.0
    return Forward(kept, gradient_of_logits(model, positions), layer)


def training(
    model: Model, held: Parts, forward: Forward, accumulates: bool, is_known: bool = True
) -> Iterator[Phase]:
    """A backward pass from beginning to end, whose gradients may be added to others, and the optimiser step
    after it.
    """
    zero, grads = model.zero, gradients(model)
    before = grads if accumulates or zero.stage == 3 else Parts()
    present = Parts(buffers=gathered(model, is_known))
    reserved = 0 if zero.on_cpu or zero.stage == 0 else buffers_of_reduction(model)
    running = held + before + present + forward.kept + Parts(buffers=reserved)
    yield Phase("backward begins", running + Parts(logits=forward.loss))
    yield Phase("recomputation", running + Parts(activations=forward.layer))
    # Stage 2 keeps the sum of earlier micro-batches apart from the gradients of the running one.
    after = before + grads if zero.stage == 2 else grads
    yield Phase("backward ends", held + after + present + Parts(buffers=buffers_of_reduction(model)))
    yield Phase("optimiser step", held + grads + Parts(buffers=copies_in_step(model)))
