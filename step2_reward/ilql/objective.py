"""Losses and metrics of ILQL on micro-batches and on held-out records."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.data.batching import Tokens, batches_of_rank
from common.model.engine_protocol import Engine
from common.model.forward import base_model, label_pass, pad_token_id
from common.model.head import Targets
from common.model.q_heads import NAME, HeadOutputs, lowest_q
from common.model.unpadded import make_inputs
from common.runtime.distributed import sum_over_ranks
from common.runtime.progress import track
from common.training.means import Mean
from step2_reward.ilql.data import Batch, Scale, ScoredResponse, collate
from step2_reward.ilql.loss import awac_loss, cql_loss, expectile_loss, next_values, td_loss
from step2_reward.ilql.options import ILQLOptions

TERMS = ("q_loss", "v_loss", "cql_loss", "awac_loss")


class ActionPass(NamedTuple):
    """Result of a forward pass for N actions."""

    logprobs: Tensor  # (N,)
    heads: HeadOutputs
    target_q: Tensor  # (N,) the smaller one of the two target heads


def action_pass(engine: nn.Module, targets: nn.ModuleList, batch: Batch, is_summed: bool) -> ActionPass:
    """Policy and heads on the states before each action, in one forward pass.

    The heads run within it, behind the output head: ZeRO-3 fetches weights in the order of a pass.
    """
    base, outputs = base_model(engine), []
    positions = batch.is_action.roll(-1, dims=1)
    chosen = make_inputs(engine, base, batch.input_ids, positions).positions

    def run_heads(_: nn.Module, arguments: tuple[Tensor], __: Tensor) -> None:
        states = arguments[0] if arguments[0].ndim == 2 else arguments[0][chosen]  # (N, h)
        with torch.no_grad():
            target_q = lowest_q(targets, states, batch.actions)
        outputs[:] = getattr(base, NAME)(states, batch.actions), target_q

    hook = base.get_output_embeddings().register_forward_hook(run_heads)
    try:
        labels = label_pass(engine, batch.input_ids, positions, Targets(batch.actions, is_summed=is_summed))
    finally:
        hook.remove()
    return ActionPass(labels.logprobs, *outputs)


def losses(passed: ActionPass, batch: Batch, options: ILQLOptions) -> Tensor:
    """The terms of the loss, (4, N) in the order of TERMS; those of the two Q heads are added up."""
    q, logsumexps, values = passed.heads
    following = next_values(values, batch.is_last)
    return torch.stack([
        sum(td_loss(one, batch.rewards, following, options.gamma) for one in q),
        expectile_loss(values, passed.target_q, options.tau),
        sum(cql_loss(*one) for one in zip(q, logsumexps, strict=True)),
        awac_loss(passed.logprobs, passed.target_q - values, options.beta),
    ])  # fmt: skip


def weights(options: ILQLOptions, like: Tensor) -> Tensor:
    """Weights of TERMS, (4,)."""
    return like.new_tensor([1.0, 1.0, options.cql_scale, options.awac_scale])


def batch_loss(
    engine: nn.Module, targets: nn.ModuleList, batch: Batch, options: ILQLOptions
) -> tuple[Tensor, Tensor]:
    """Sum of the loss over the actions of a micro-batch, and the sums that `figures` takes, (10,)."""
    passed = action_pass(engine, targets, batch, is_summed=options.beta == 0)
    terms = losses(passed, batch, options).sum(1)  # (4,)
    loss = weights(options, terms) @ terms
    lowest, values = passed.heads.q.detach().amin(0), passed.heads.values.detach()
    errors = ((lowest - batch.rewards).square() * batch.is_last).sum()
    parts = [loss, *terms, lowest.sum(), passed.target_q.sum(), values.sum(), errors, batch.is_last.sum()]
    sums = torch.stack([part.detach().double().cpu() for part in parts])
    return loss, sums


def figures(sums: Sequence[float], num_actions: int) -> dict[str, Mean]:
    """Metrics from sums over all ranks: the loss and its terms, Q, target Q and V, and the squared error of Q
    at the last tokens.
    """
    names = ("loss", *TERMS, "q", "target_q", "value")
    metrics = {name: Mean(total, num_actions) for name, total in zip(names, sums[:8], strict=True)}
    metrics["advantage"] = Mean(sums[6] - sums[7], num_actions)
    return metrics | {"score_loss": Mean(sums[8], sums[9])}


@torch.no_grad()
def evaluate(
    engine: Engine, targets: nn.ModuleList, rows: Sequence[ScoredResponse], size: int | Tokens, scale: Scale,
    options: ILQLOptions,
) -> dict[str, float]:  # fmt: skip
    """Metrics of held-out records."""
    engine.eval()
    sums: Any = torch.zeros(10, dtype=torch.float64)
    batches = batches_of_rank([row.length for row in rows], size)
    for indices, is_real in track("scoring records", batches, len(rows)):
        batch = collate([rows[i] for i in indices], pad_token_id(engine), scale)
        sums += batch_loss(engine, targets, batch, options)[1] * is_real
    engine.train()
    metrics = figures(sum_over_ranks(*sums), sum(row.num_actions for row in rows))
    return {f"eval/{name}": mean.value for name, mean in metrics.items()}
