"""From options to the seconds of a step, by phase. Rows have the maximum length, as in the plan of memory."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from common.generation.compiled import cache_size
from common.runtime.options import world_size
from launch.plan.hardware import table_of, with_measured
from launch.plan.memory import FP32, Model
from launch.plan.options import PlanOptions
from launch.plan.phases import Sizes
from launch.plan.predict import Models, batch_sizes, fitted, paths_of_scorers, read_models
from launch.plan.timing import (
    Cluster,
    Decoder,
    Engine,
    Rows,
    Seconds,
    computing,
    decoding_step,
    forward_flops,
    gathering,
    scoring,
    states_moved,
    update,
)


class Step(NamedTuple):
    """A step: seconds by phase, and tokens of prompts and responses over all ranks."""

    seconds: Seconds
    tokens: float


class Decoders(NamedTuple):
    """The models of step 3."""

    actor: Decoder
    critic: Decoder | None
    reference: Decoder
    scorers: list[Decoder]
    cost_critic: Decoder | None

    @property
    def trained(self) -> list[Decoder]:
        return [*filter(None, (self.actor, self.critic, self.cost_critic))]


def step_seconds(options: PlanOptions) -> dict[str, Step]:
    """An optimiser step of steps 1 and 2, and an iteration of step 3."""
    options = fitted(options)
    models = read_models(options)
    sizes = batch_sizes(options, models.actor)
    hardware = table_of(options.gpu, options.link, options.gpus_per_node)
    if options.measured_speeds:
        hardware = with_measured(hardware, options.measured_speeds)
    cluster = Cluster(hardware, options.gpus_per_node)
    reward = scalar_model(models.reward)
    policy = Decoder(models.policy, reward.layers)  # its head may be the embedding, which counts once
    records, length = options.global_batch_size, options.max_length
    rows = Rows(records / world_size(), length, positions=length, is_summed=True)
    pairs = Rows(2 * records / world_size(), length)
    passes = math.ceil(rows.count / sizes.rows(length))
    passes_of_pairs = math.ceil(pairs.count / sizes.rows(length, per_record=2))
    tokens = options.rollout_batch_size * (options.max_prompt_length + options.max_response_length)
    parts = iteration(options, decoders(options, models), sizes, cluster)
    return {
        "step 1": Step(update(policy, rows, passes, sizes.checkpointing, cluster), records * length),
        "step 2": Step(
            update(reward, pairs, passes_of_pairs, sizes.checkpointing, cluster), 2 * records * length
        ),
        "step 3": Step(sum(parts, Seconds()), tokens),
    }


def scalar_model(model: Model) -> Decoder:
    """A critic or reward model: its only matrix of the vocabulary is the embedding."""
    return Decoder(model, model.shape.parameters - model.shape.vocabulary * model.shape.hidden)


def decoders(options: PlanOptions, models: Models) -> Decoders:
    """The models of step 3. The gold reward model scores in evaluations only."""
    scorers = models.scorers[:-1] if options.gold_reward_model else models.scorers
    layers = scalar_model(models.reward).layers
    actor = Decoder(models.actor, layers)
    critic = scalar_model(models.critic) if models.critic else None
    reference = Decoder(models.reference, layers) if models.reference else actor
    is_shared = len(scorers) < sum(
        map(len, paths_of_scorers(options))
    )  # critics are the models of their scores
    cost_critic = scalar_model(models.cost_critic) if models.cost_critic else None
    without_adapter = [*filter(None, (critic, cost_critic))] * is_shared
    return Decoders(actor, critic, reference, [*map(scalar_model, scorers), *without_adapter], cost_critic)


def iteration(options: PlanOptions, models: Decoders, sizes: Sizes, cluster: Cluster) -> Iterator[Seconds]:
    """Parts of an iteration of step 3."""
    yield from rollout(options, models.actor, sizes, cluster)
    shared = sizes.sharing  # responses per row
    row = Rows(1 / shared, sizes.width, shared * sizes.response, is_shared=shared > 1)  # of a response
    yield from scores(options, models, sizes, row, cluster)
    yield from updates(options, models, sizes, row, cluster)
    if options.ema_decay:
        fp32 = FP32 * models.actor.model.shape.trained
        yield Seconds(copies=fp32 / cluster.hardware.host_bandwidth)
    if options.offload_states:
        for model in models.trained:
            yield Seconds(copies=states_moved(model, cluster.hardware))


def scores(
    options: PlanOptions, models: Decoders, sizes: Sizes, row: Rows, cluster: Cluster
) -> Iterator[Seconds]:
    """Log-probabilities of reference and, in 16 bits or with vLLM, of the actor; scores; values."""
    rows = row._replace(count=row.count * options.rollout_batch_size / world_size())
    passes = math.ceil(rows.count / sizes.shared_rows(sizes.generated))
    is_rescored = models.actor.model.zero.size < FP32 or sizes.engine_ranks > 0
    for model in (models.reference, *[models.actor] * is_rescored):
        yield scoring(model, rows, passes, cluster)
    for model in (*models.scorers, *models.trained[1:]):
        yield scoring(model, rows._replace(positions=0), passes, cluster)


def updates(
    options: PlanOptions, models: Decoders, sizes: Sizes, row: Rows, cluster: Cluster
) -> Iterator[Seconds]:
    """All epochs, and the forward pass on a minibatch that measures the KL after the last update."""
    of_update = min(options.global_batch_size, options.rollout_batch_size)
    rows = row._replace(count=row.count * of_update / world_size())
    passes = math.ceil(rows.count / sizes.shared_rows(sizes.micro_batch))
    steps = options.ppo_epochs * options.rollout_batch_size / of_update
    more = 1 + bool(options.ptx_data)  # as many demonstrations
    of_actor = rows._replace(count=more * rows.count), more * passes
    yield times(steps, update(models.actor, *of_actor, sizes.actor_checkpointing, cluster))
    for critic in models.trained[1:]:
        of_values = rows._replace(positions=0)
        yield times(steps, update(critic, of_values, passes, sizes.critic_checkpointing, cluster))
    yield Seconds(updates=computing(forward_flops(models.actor, rows), models.actor, cluster.hardware))


def rollout(options: PlanOptions, actor: Decoder, sizes: Sizes, cluster: Cluster) -> Iterator[Seconds]:
    """Reading of prompts, decoding, and the way of the weights to the sampler."""
    hardware, zero, ranks = cluster.hardware, actor.model.zero, max(sizes.engine_ranks, 1)
    groups, batch = world_size() / ranks, options.generation_batch_size
    rows = math.ceil(options.rollout_batch_size / groups)
    chunks = [min(batch, rows - start) for start in range(0, rows, batch)]
    # Responses to a prompt are dealt to the ranks in turn, and each rank reads the prompt once.
    copies = min(options.samples_per_prompt, groups) / options.samples_per_prompt
    read = Rows(options.rollout_batch_size / groups * copies, sizes.prompt, positions=1)
    prefill = computing(forward_flops(actor, read), actor, hardware) / ranks
    is_whole = zero.stage < 3 or sizes.gathers or sizes.engine_ranks > 0
    engine = "vllm" if sizes.engine_ranks else "compiled" if is_whole and sizes.compiles else "eager"
    adapters = options.lora_rank > 0 and not is_whole
    decode = sum(
        decoding_step(actor, *size, engine, hardware, ranks, adapters)
        for chunk in chunks
        for size in cache_sizes(chunk, sizes, engine)
    )
    yield Seconds(prefill=prefill, decode=decode)
    gather = gathering(actor, cluster)
    if is_whole:
        pushed = 2 * actor.bytes / hardware.memory_bandwidth * (engine == "vllm")
        yield Seconds(communication=gather, copies=pushed)
    else:  # for every token of a chunk, while the token before is computed
        passes = len(chunks) * sizes.response
        fetching = gather + (passes - 1) * gathering(actor, cluster, is_repeated=True)
        yield Seconds(communication=max(0, fetching - prefill - decode))


def cache_sizes(rows: int, sizes: Sizes, engine: Engine) -> list[tuple[int, int]]:
    """Rows and columns of keys and values that each decoding step reads; compiled ones read all columns."""
    last = sizes.prompt + sizes.response - 1
    if engine == "compiled":
        return [cache_size(rows, last)] * (sizes.response - 1)
    return [(rows, width) for width in range(sizes.prompt + 1, last + 1)]


def times(count: float, seconds: Seconds) -> Seconds:
    return Seconds({phase: count * value for phase, value in seconds.items()})
