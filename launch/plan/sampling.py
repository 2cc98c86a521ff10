"""Memory while responses are sampled. Pure arithmetic."""

from typing import NamedTuple

from common.generation.compiled import cache_size
from launch.plan.activations import kv_cache, passing
from launch.plan.logits import logits_in_sampling
from launch.plan.memory import Model, Parts, gathered

ENGINE_TOKENS = 8192  # that vLLM reads in one pass: its default


class SampleBatch(NamedTuple):
    """Rows that a rank samples at once, all of the maximum length."""

    rows: int
    prompts: int  # distinct ones; each is read once
    prompt: int  # tokens
    response: int
    gathers: bool = True  # all weights at stage 3
    compiles: bool = False  # the cache then has a power of two of rows, and columns to spare


def sampling(actor: Model, batch: SampleBatch) -> Parts:
    """Memory of the decoding loop, at the end of the prompts or of the responses."""
    rows, columns = batch.rows, batch.prompt + batch.response - 1  # the last token is no input
    is_partitioned = gathered(actor) > 0
    if batch.compiles and (batch.gathers or not is_partitioned):
        rows, columns = cache_size(rows, columns)
    fetched = actor.zero.size * actor.shape.parameters if batch.gathers else gathered(actor)
    parts = Parts({"KV cache": kv_cache(actor, rows, columns)})
    parts["buffers"] = fetched if is_partitioned else 0
    if batch.gathers or not is_partitioned:  # copies of frozen weights, with the adapters merged
        parts["buffers"] += actor.zero.size * (actor.shape.parameters - actor.shape.trained)
    return parts + Parts(
        activations=passing(actor, batch.prompts, batch.prompt), logits=logits_in_sampling(actor, batch.rows)
    )


def engine(actor: Model, ranks: int, cache: float, rows: int) -> Parts:
    """vLLM's weights, a part on each of the ranks that share them; its cache; its largest pass."""
    return Parts(
        {
            "weights": actor.zero.size * actor.shape.parameters / ranks,
            "KV cache": cache,
            "activations": passing(actor, 1, ENGINE_TOKENS) / ranks,
            "logits": logits_in_sampling(actor, rows),
        }
    )
