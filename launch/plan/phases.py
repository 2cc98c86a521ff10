"""Phases of each step in which memory may peak, and their memory by part. Pure arithmetic."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from launch.plan.activations import (
    Mask,
    activations,
    in_backward,
    in_layer,
    last_states,
    of_mask,
    passing,
)
from launch.plan.logits import allowed_tokens, gradient_of_logits, logits, logits_in_scoring
from launch.plan.memory import (
    Model,
    Parts,
    buffers_of_reduction,
    copies_in_step,
    gradients,
    optimiser,
    optimiser_away,
    present,
    total,
    weights,
)
from launch.plan.sampling import SampleBatch, engine, sampling


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
    group: int = 1  # responses to a prompt
    sharing: int = 1  # of them, responses that share a row with the prompt in scoring and updates
    compiles: bool = False  # --compile_generation
    engine_ranks: int = 0  # that share a copy of vLLM's weights; 0: the policy samples
    engine_cache: float = 0.0  # bytes of keys and values in vLLM
    offloads_states: bool = False  # --offload_states
    tokens: int = 0  # of a micro-batch, in place of `micro_batch` and of scoring in batches of `generated`
    packs: bool = False  # --packing with a mask
    samples: int = 0  # answers sampled in evaluations of step 1
    sample_length: int = 0

    @property
    def width(self) -> int:
        """Tokens of a row in step 3."""
        return self.prompt + self.sharing * self.response

    def rows(self, width: int, per_record: int = 1) -> int:
        """Rows of this width in a micro-batch."""
        return self.filled(width, per_record) or per_record * self.micro_batch

    def filled(self, width: int, per_record: int = 1) -> int:
        """Rows of this width that fill `tokens`, at least one record; 0 without a number of tokens."""
        return max(self.tokens // (per_record * width), 1) * per_record if self.tokens else 0

    def shared_rows(self, responses: int) -> int:
        """Rows of a batch of step 3 with so many responses, or with `tokens`."""
        return self.filled(self.width) or max(responses // self.sharing, 1)


class Forward(NamedTuple):
    """Memory saved by a forward pass, and memory of its backward pass."""

    saved: Parts
    loss: float  # temporary, at its start
    layer: float  # what one layer saves
    gradients: float  # of activations, in one layer
    mask: float
    is_recomputed: bool  # whether layers save only their input


def peak(phases: Iterable[Phase]) -> Phase:
    """The phase with the largest memory. Host memory is that of all phases: what is pinned stays pinned."""
    phases = [*phases]
    name, parts = max(phases, key=lambda phase: total(phase.parts))
    return Phase(name, parts | Parts(host=max(phase.parts["host"] for phase in phases)))


def step1(policy: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """All rows have the maximum length, and all tokens are trained."""
    width = sizes.length
    rows = sizes.rows(width)
    mask = "packed" if sizes.packs else "none"
    forward = passed(policy, rows, width, sizes.checkpointing, rows * width, mask)
    held = fixed + weights(policy) + optimiser(policy)
    yield from training(policy, held, forward, sizes.accumulates)
    if sizes.samples:
        batch = SampleBatch(
            sizes.samples, sizes.samples, width, sizes.sample_length, sizes.gathers, sizes.compiles
        )
        idle = held + (gradients(policy) if policy.zero.stage == 3 else Parts())
        yield Phase("evaluation", idle + sampling(policy, batch))


def step2(reward: Model, sizes: Sizes, fixed: Parts) -> Iterator[Phase]:
    """Chosen and rejected responses are separate rows of maximum length."""
    width = sizes.length
    rows = sizes.rows(width, per_record=2)
    forward = passed(reward, rows, width, sizes.checkpointing)
    yield from training(reward, fixed + weights(reward) + optimiser(reward), forward, sizes.accumulates)


def step3(
    actor: Model, critic: Model | None, reference: Model | None, rewards: list[Model], sizes: Sizes,
    fixed: Parts, cost_critic: Model | None = None,
) -> Iterator[Phase]:  # fmt: skip
    """All prompts and responses have the maximum length. reference: None if it is the actor without its
    adapter. rewards: of costs too; empty if the reward model is the critic without its adapter.
    """
    trained = [*filter(None, (actor, critic, cost_critic))]
    held = sum((weights(model) for model in [*trained, *rewards]), fixed)
    if reference:
        held += weights(reference)
    held["token lists"] += allowed_tokens(sizes.top_k, sizes.top_p, sizes.rollout * sizes.response)
    in_rollout = rollout(actor, sizes)
    if sizes.engine_ranks and actor.zero.on_cpu:  # where vLLM keeps them during training
        held += Parts({part: in_rollout.pop(part) for part in ("weights", "KV cache")})
    idle = sum((optimiser_between(model, sizes.offloads_states) for model in trained), held)
    idle = sum((gradients(model) for model in trained if model.zero.stage == 3), idle)
    held = sum((optimiser(model) for model in trained), held)
    yield Phase("rollout", idle + in_rollout)
    scorers = [reference or actor, *rewards, *trained[1:]]
    rows, mask = sizes.shared_rows(sizes.generated), shared_mask(sizes)
    for number, model in enumerate(scorers):
        base = idle + Parts(buffers=present(model))
        yield Phase("scoring", base + Parts(activations=passing(model, rows, sizes.width, mask)))
        if not number:
            head = logits_in_scoring(model, rows * sizes.sharing * sizes.response)
            states = last_states(model, rows, sizes.width)
            yield Phase("scoring", base + Parts(activations=states, logits=head))
    yield from updates(actor, critic, held, sizes, cost_critic)


def rollout(actor: Model, sizes: Sizes) -> Parts:
    """What sampling takes, by the policy or by vLLM."""
    rows = sizes.generated
    if sizes.engine_ranks:
        return engine(actor, sizes.engine_ranks, sizes.engine_cache, rows)
    prompts = -(-rows // sizes.group)
    return sampling(
        actor, SampleBatch(rows, prompts, sizes.prompt, sizes.response, sizes.gathers, sizes.compiles)
    )


def shared_mask(sizes: Sizes) -> Mask:
    return "shared" if sizes.sharing > 1 else "none"


def optimiser_between(model: Model, offloads_states: bool) -> Parts:
    """The optimiser's states between updates: DeepSpeed can offload them at stages 1 and 2."""
    moves = offloads_states and model.zero.stage in (1, 2) and not model.zero.on_cpu
    return Parts(host=optimiser_away(model)) if moves else optimiser(model)


def updates(
    actor: Model, critic: Model | None, held: Parts, sizes: Sizes, cost_critic: Model | None = None
) -> Iterator[Phase]:
    """Micro-batches of a rollout, of actor and critic by turns, then of the critic of costs.

    held: memory in use all the time.
    """
    rows, width, mask = sizes.shared_rows(sizes.micro_batch), sizes.width, shared_mask(sizes)
    positions = rows * sizes.sharing * sizes.response
    policy = passed(actor, rows, width, sizes.actor_checkpointing, positions, mask)
    if not critic:
        yield from training(actor, held, policy, sizes.accumulates)
        return
    if cost_critic:
        costs = passed(cost_critic, rows, width, sizes.critic_checkpointing, mask=mask)
        beside = sum((gradients(model) for model in (actor, critic) if model.zero.stage == 3), held)
        yield from training(cost_critic, beside, costs, sizes.accumulates)
        held = held + (gradients(cost_critic) if cost_critic.zero.stage == 3 else Parts())
    values = passed(critic, rows, width, sizes.critic_checkpointing, mask=mask)
    for model, other, forward in ((actor, critic, policy), (critic, actor, values)):
        has_gradients = sizes.accumulates or other.zero.stage == 3
        beside = held + (gradients(other) if has_gradients else Parts())
        yield from training(model, beside, forward, sizes.accumulates)


def passed(
    model: Model, rows: int, width: int, checkpointing: bool, positions: int = 0, mask: Mask = "none"
) -> Forward:
    """A forward pass over rows x width tokens, with logits at some positions."""
    saved = Parts(activations=activations(model, rows, width, checkpointing, mask))
    saved["logits"] = logits(model, positions)
    return Forward(
        saved,
        loss=gradient_of_logits(model, positions),
        layer=in_layer(model, rows, width, mask),
        gradients=in_backward(model, rows, width),
        mask=of_mask(model, rows, width, mask),
        is_recomputed=checkpointing,
    )


def training(model: Model, held: Parts, forward: Forward, accumulates: bool) -> Iterator[Phase]:
    """Phases of a backward pass, which may accumulate gradients, and of the optimiser step after it."""
    zero, grads = model.zero, gradients(model)
    before = grads if accumulates or zero.stage == 3 else Parts()
    weights_in_use = Parts(buffers=present(model))
    reserved = 0 if zero.on_cpu or zero.stage == 0 else buffers_of_reduction(model)
    running = held + before + weights_in_use + Parts(buffers=reserved)
    yield Phase("backward begins", running + forward.saved + Parts(logits=forward.loss))
    in_layer = Parts(activations=forward.gradients + forward.layer * forward.is_recomputed)
    name = "recomputation" if forward.is_recomputed else "last layer"
    yield Phase(name, running + Parts(activations=forward.saved["activations"]) + in_layer)
    # Stage 2 keeps sums in 16 bits separate from the gradients of the current micro-batch.
    has_both = zero.stage == 2 and not zero.sums_in_fp32
    after = held + weights_in_use + (before + grads if has_both else grads)
    after += Parts(buffers=buffers_of_reduction(model))
    # Before the gradients of this layer and of the embedding, often the largest tensor.
    others = max(model.shape.trained - model.shape.largest, 0) * (1 - 1 / max(model.shape.layers, 1))
    missing = 1 - others / model.shape.trained if model.shape.trained else 0.0
    first = Parts(activations=forward.layer + forward.gradients + forward.mask)
    yield Phase("first layer", after + first - Parts(gradients=missing * grads["gradients"]))
    yield Phase("backward ends", after)
    yield Phase("optimiser step", held + grads + Parts(buffers=copies_in_step(model)))
