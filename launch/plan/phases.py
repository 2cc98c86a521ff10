"""Phases of each step in which memory may peak, and their memory by part. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from launch.plan.memory import (
    Model,
    Parts,
    activations,
    allowed_tokens,
    buffers_of_reduction,
    copies_in_step,
    gathered,
    gradient_of_logits,
    gradients,
    in_layer,
    kv_cache,
    logits,
    logits_in_sampling,
    logits_in_scoring,
    optimiser,
    passing,
    total,
    weights,
)


class Phase(NamedTuple):
    """A phase of a step and its memory."""

    name: str
    parts: Parts


@dataclass(frozen=True)
class Sizes:
    """Batch sizes and lengths on one rank."""

    micro_batch: int
    accumulates: bool  # gradient accumulation: a step has more than one micro-batch
    checkpointing: bool  # in steps 1 and 2
    actor_checkpointing: bool
    critic_checkpointing: bool
    length: int  # of a row in steps 1 and 2
    prompt: int
    response: int
    generated: int  # rows that step 3 generates or scores at once
    rollout: int  # rows that step 3 samples in an iteration, on all ranks
    top_k: int
    top_p: float
    gathers: bool  # --gather_for_generation
    engine_ranks: int = 0  # that share a copy of vLLM's weights; 0: the policy samples
    offloads_states: bool = False  # --offload_states
    tokens: int = 0  # of a micro-batch, in place of `micro_batch` and of scoring in batches of `generated`

    def rows(self, width: int, per_record: int = 1) -> int:
        """Rows of this width in a micro-batch."""
        return self.filled(width, per_record) or per_record * self.micro_batch

    def filled(self, width: int, per_record: int = 1) -> int:
        """Rows of this width that fill `tokens`, at least one record; 0 without a number of tokens."""
        return max(self.tokens // (per_record * width), 1) * per_record if self.tokens else 0


class Forward(NamedTuple):
    """Memory saved by a forward pass, and temporary memory of its backward pass."""

    saved: Parts
    loss: float = 0.0  # at its start
    layer: float = 0.0  # one recomputed layer


def peak(phases: Iterator[Phase]) -> Phase:
    """The phase with the largest memory."""
    return max(phases, key=lambda phase: total(phase.parts))


def step1(policy: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """All rows have the maximum length, and all tokens are trained."""
    width = sizes.length
    rows = sizes.rows(width)
    forward = passed(policy, rows, width, sizes.checkpointing, rows * width)
    yield from training(policy, fixed + weights(policy) + optimiser(policy), forward, sizes.accumulates)


def step2(reward: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """Chosen and rejected responses are separate rows of maximum length."""
    width = sizes.length
    rows = sizes.rows(width, per_record=2)
    forward = passed(reward, rows, width, sizes.checkpointing)
    yield from training(reward, fixed + weights(reward) + optimiser(reward), forward, sizes.accumulates)


def step3(
    actor: Model, critic: Model | None, reference: Model | None, rewards: list[Model], sizes: Sizes,
    fixed: Parts,
) -> Iterator[Phase]:  # fmt: skip
    """All prompts and responses have the maximum length. reference: None if it is the actor without its
    adapter. rewards: empty if the reward model is the critic without its adapter.
    """
    trained = [actor, critic] if critic else [actor]
    held = sum((weights(model) for model in [*trained, *rewards]), fixed)
    if reference:
        held += weights(reference)
    held["token lists"] += allowed_tokens(sizes.top_k, sizes.top_p, sizes.rollout * sizes.response)
    rows, width = sizes.generated, sizes.prompt + sizes.response
    in_rollout = engine(actor, sizes) if sizes.engine_ranks else sampling(actor, sizes)
    if sizes.engine_ranks and actor.zero.on_cpu:  # where vLLM keeps them during training
        held, in_rollout = held + in_rollout, Parts()
    idle = sum((optimiser_between(model, sizes.offloads_states) for model in trained), held)
    idle = sum((gradients(model) for model in trained if model.zero.stage == 3), idle)
    held = sum((optimiser(model) for model in trained), held)
    yield Phase("rollout", idle + in_rollout)
    scorers = [reference or actor, *rewards, *([critic] if critic else [])]
    rows = sizes.filled(width) or rows
    for number, model in enumerate(scorers):
        scoring = Parts(activations=passing(model, rows, width), buffers=gathered(model))
        scoring["logits"] = 0 if number else logits_in_scoring(model, rows * sizes.response)
        yield Phase("scoring", idle + scoring)
    yield from updates(actor, critic, held, sizes, has_adapters=reference is None)


def sampling(actor: Model, sizes: Sizes) -> Parts:
    """Memory of the decoding loop."""
    rows, width = sizes.generated, sizes.prompt + sizes.response
    fetched = actor.zero.size * actor.shape.parameters if sizes.gathers else gathered(actor)
    parts = Parts({"KV cache": kv_cache(actor, rows, width)})
    parts["buffers"] = fetched if gathered(actor) else 0
    if sizes.gathers or not gathered(actor):  # copies of frozen weights, with the adapters merged
        parts["buffers"] += actor.zero.size * (actor.shape.parameters - actor.shape.trained)
    return parts + Parts(
        activations=passing(actor, rows, sizes.prompt), logits=logits_in_sampling(actor, rows)
    )


def engine(actor: Model, sizes: Sizes) -> Parts:
    """vLLM's weights and cache, a part on each of the ranks that share them."""
    copy, width = actor.zero.size * actor.shape.parameters, sizes.prompt + sizes.response
    cache = kv_cache(actor, sizes.generated, width)
    return Parts({"weights": copy / sizes.engine_ranks, "KV cache": cache / sizes.engine_ranks})


def optimiser_between(model: Model, offloads_states: bool) -> Parts:
    """The optimiser's states between updates: DeepSpeed can offload them at stages 1 and 2."""
    states = optimiser(model)
    moves = offloads_states and model.zero.stage in (1, 2) and not model.zero.on_cpu
    return Parts(host=sum(states.values())) if moves else states


def updates(
    actor: Model, critic: Model | None, held: Parts, sizes: Sizes, has_adapters: bool
) -> Iterator[Phase]:
    """Training on micro-batches of a rollout. held: memory in use all the time.

    The critic's first forward pass is made during scoring and saved while the actor trains on its first
    micro-batch; there are no gradients then. Later the models alternate.
    """
    width = sizes.prompt + sizes.response
    rows = sizes.rows(width)
    policy = passed(actor, rows, width, sizes.actor_checkpointing, rows * sizes.response)
    values = passed(critic, rows, width, sizes.critic_checkpointing) if critic else Forward(Parts())

    def beside(other: Model | None, accumulates: bool) -> Parts:
        return gradients(other) if other and (accumulates or other.zero.stage == 3) else Parts()

    first = held + values.saved + beside(critic, False)
    # With adapters, the previous pass ran without them, so there is no trace.
    yield from training(actor, first, policy, accumulates=False, is_traced=not has_adapters)
    for model, other, forward in ((actor, critic, policy), (critic, actor, values)):
        if model:
            added = held + beside(other, sizes.accumulates)
            yield from training(model, added, forward, sizes.accumulates)


def passed(model: Model, rows: int, width: int, checkpointing: bool, positions: int = 0) -> Forward:
    """A forward pass over rows x width tokens, with logits at some positions."""
    saved = Parts(activations=activations(model, rows, width, checkpointing), logits=logits(model, positions))
    layer = in_layer(model, rows, width) if checkpointing else 0.0
    return Forward(saved, gradient_of_logits(model, positions), layer)


def training(
    model: Model, held: Parts, forward: Forward, accumulates: bool, is_traced: bool = True
) -> Iterator[Phase]:
    """Phases of a backward pass, which may accumulate gradients, and of the optimiser step after it."""
    zero, grads = model.zero, gradients(model)
    before = grads if accumulates or zero.stage == 3 else Parts()
    present = Parts(buffers=gathered(model, is_traced))
    reserved = 0 if zero.on_cpu or zero.stage == 0 else buffers_of_reduction(model)
    running = held + before + present + forward.saved + Parts(buffers=reserved)
    yield Phase("backward begins", running + Parts(logits=forward.loss))
    yield Phase("recomputation", running + Parts(activations=forward.layer))
    # Stage 2 keeps the sum over earlier micro-batches separate from the gradients of the current one.
    after = before + grads if zero.stage == 2 else grads
    yield Phase("backward ends", held + after + present + Parts(buffers=buffers_of_reduction(model)))
    yield Phase("optimiser step", held + grads + Parts(buffers=copies_in_step(model)))
