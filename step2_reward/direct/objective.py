"""Loss and metrics of a batch of records, in training and evaluation."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, assert_never

import torch
from torch import Tensor

from common.data.batching import batches_of_rank, micro_batch
from common.model.engine import backward_and_step
from common.model.engine_protocol import Engine
from common.model.forward import base_model
from common.model.load_balancing import has_balance_loss
from common.runtime.distributed import device, sum_over_ranks
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.training.means import Mean
from step2_reward.direct.data import Choice, Example
from step2_reward.direct.logprobs import response_logprobs
from step2_reward.direct.loss import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_loss,
    simpo_loss,
)
from step2_reward.direct.options import DirectOptions

# The total of `global_totals` that each metric is divided by.
DIVISORS = {
    "loss": "losses", "accuracy": "decided", "nll_chosen": "chosen tokens", "reward/chosen": "chosen",
    "reward/rejected": "rejected", "logprobs/chosen": "chosen", "logprobs/rejected": "rejected",
    "logratio/mean": "responses", "aux_loss": "tokens",
}  # fmt: skip


def check_accuracy(options: DirectOptions, held_out: Sequence[Choice]) -> None:
    """Raise UserError when --best_metric is eval/accuracy and all held-out pairs are ties."""
    if options.best_metric != "eval/accuracy" or not options.is_paired:
        return
    if not any(pair.is_label for row in held_out for pair in row.pairs):
        raise UserError(
            "--best_metric eval/accuracy: the held-out pairs are all ties; allowed: none or eval/loss"
        )


def evaluate(engine: Engine, examples: Sequence[Example], options: DirectOptions) -> dict[str, float]:
    """Compute loss, accuracy, reward margin, and negative log-likelihood per token of chosen responses."""
    engine.eval()
    with torch.no_grad():
        metrics, _ = batch_metrics(engine, examples, options, train=False, title="evaluating records")
    engine.train()
    names = {"loss": "loss", "accuracy": "accuracy", "reward/margin": "margin", "nll_chosen": "nll_chosen"}
    return {f"eval/{short}": metrics[name].value for name, short in names.items() if name in metrics}


def batch_metrics(
    engine: Engine, examples: Sequence[Example], options: DirectOptions, train: bool,
    title: str = "",
) -> tuple[dict[str, Mean], float | None]:  # fmt: skip
    """Compute the metrics of a global batch; with `train`, also take an optimiser step, and return its
    gradient norm.

    Accuracy: share of pairs whose better response has the higher reward, without ties, and with soft labels
    rounded; in KTO, share of responses on the right side of the reference point. In all other metrics a tie
    or a soft label counts each response on both sides, by its probability. Rewards are beta times the
    log-ratios or log-probabilities that the loss compares.

    logratio/mean is the mean log-ratio of policy and reference per response of the data, in nats. It is no
    estimate of their KL, which needs responses of the policy (launch/evaluate_ppo.sh). KTO's estimate is
    kl/reference_point.

    title: of the progress lines; empty: none.
    """
    totals = global_totals(examples, options)
    point = 0.0 if options.is_paired else reference_point(engine, examples, options)
    batches = micro_batches(examples, options)
    sums: Counter[str] = Counter()
    norm = None
    for number, (batch_indices, is_real) in enumerate(track(title, batches, len(examples)), start=1):
        micro = [examples[i] for i in batch_indices]
        loss, parts = micro_batch_loss(engine, micro, totals, point, options)
        if train:
            norm = backward_and_step(engine, loss, world_size(), is_last=number == len(batches))
        for name, value in parts.items():
            sums[name] += value.detach() * is_real
    means = dict(zip(sums, sum_over_ranks(*sums.values()), strict=True))
    divisors = {name: totals[DIVISORS[name]] for name in means}
    metrics = {name: Mean(value * divisors[name], divisors[name]) for name, value in means.items()}
    if {"reward/chosen", "reward/rejected"} <= means.keys():
        metrics["reward/margin"] = Mean(means["reward/chosen"] - means["reward/rejected"])
    return metrics if options.is_paired else metrics | {"kl/reference_point": Mean(point)}, norm


def micro_batch_loss(
    engine: Engine, micro: Sequence[Example], totals: dict[str, float], point: float, options: DirectOptions,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Compute a micro-batch's share of loss and metrics of the global batch (see `global_totals`)."""
    kind = options.kind
    dialogues = [dialogue for example in micro for dialogue in example.row.dialogues]
    sides = [side for example in micro for side in example.row.sides(options.is_paired)]
    with_prompt = [kind.nll_has_prompt and chosen > 0 for chosen, _ in sides]
    # (N,), (N,), ()
    logprobs, nll_logprobs, balance = response_logprobs(engine, dialogues, with_prompt)
    chosen, rejected = _tensor(sides).unbind(1)  # (N,) each
    log_ratios = logprobs - _tensor([value for example in micro for value in example.logprobs])
    lengths = [d.num_predicted for d in dialogues]
    compared = log_ratios / _tensor(lengths) if kind.is_averaged else log_ratios
    if options.is_paired:
        better, worse, weights, is_label = _pairs(micro)  # (P,) each
        differences = compared[better] - compared[worse]
        losses = weights * pair_losses(compared[better], compared[worse], options)
    else:
        is_desirable, is_label = chosen > rejected, torch.ones_like(chosen)
        differences = torch.where(is_desirable, 1.0, -1.0) * (log_ratios - point)
        weights = options.desirable_weight, options.undesirable_weight
        desirable = torch.ones_like(is_desirable)
        losses = chosen * kto_loss(log_ratios, desirable, point, options.beta, weights)
        losses = losses + rejected * kto_loss(log_ratios, ~desirable, point, options.beta, weights)
    right = ((differences > 0) + 0.5 * (differences == 0)) * is_label
    loss = losses.sum() / totals["losses"]
    if kind.has_nll:
        loss = loss - options.nll_coef * (chosen * nll_logprobs).sum() / totals["nll tokens"]
    loss = loss + balance / totals["tokens"]
    sums = {
        "accuracy": right.sum(),
        "nll_chosen": -(chosen * logprobs).sum(),
        "reward/chosen": options.beta * (chosen * compared).sum(),
        "reward/rejected": options.beta * (rejected * compared).sum(),
        "logprobs/chosen": (chosen * logprobs).sum(),
        "logprobs/rejected": (rejected * logprobs).sum(),
    }
    if engine.training and has_balance_loss(base_model(engine)):
        sums["aux_loss"] = balance
    if kind.has_reference:
        sums["logratio/mean"] = ((chosen + rejected) * log_ratios).sum()
    parts = {name: value / totals[DIVISORS[name]] for name, value in sums.items() if totals[DIVISORS[name]]}
    return loss, {"loss": loss} | parts


def pair_losses(chosen: Tensor, rejected: Tensor, options: DirectOptions) -> Tensor:
    """Compute the loss of each pair, (P,), from its log-ratios or log-probabilities, (P,) each."""
    beta, smoothing = options.beta, options.label_smoothing
    match options.loss:
        case "ipo":
            return ipo_loss(chosen, rejected, beta)
        case "hinge":
            return hinge_loss(chosen, rejected, beta)
        case "robust":
            return robust_loss(chosen, rejected, beta, smoothing)
        case "simpo":
            return simpo_loss(chosen, rejected, beta, options.gamma_beta_ratio, smoothing)
        case "orpo":
            return orpo_loss(chosen, rejected, beta)
        case "dpo" | "cpo":
            return dpo_loss(chosen, rejected, beta, smoothing)
        case _:
            assert_never(options.loss)


@torch.no_grad()
def reference_point(engine: Engine, examples: Sequence[Example], options: DirectOptions) -> float:
    """z0 of KTO: the mean log-ratio of policy and reference over unrelated responses, at least 0.

    Source: Ethayarajh et al. 2024, section 4. The authors' code averages over a micro-batch; here the mean is
    over the global batch, from a forward pass before training on it.
    """
    was_training = engine.training
    engine.eval()
    total = 0.0
    for batch_indices, is_real in micro_batches(examples, options):
        micro = [examples[i] for i in batch_indices]
        logprobs, *_ = response_logprobs(engine, [example.unrelated for example in micro])
        log_ratios = logprobs - _tensor([example.unrelated_logprob for example in micro])  # (B,)
        total = total + log_ratios.sum() * is_real
    engine.train(was_training)
    return max(0.0, sum_over_ranks(total)[0] / len(examples))


def global_totals(examples: Sequence[Example], options: DirectOptions) -> dict[str, float]:
    """Count the divisors of the sums over a global batch, without communication: all ranks have the batch."""
    totals: Counter[str] = Counter()
    for row in (example.row for example in examples):
        for dialogue, (chosen, rejected) in zip(row.dialogues, row.sides(options.is_paired), strict=True):
            totals["chosen"] += chosen
            totals["rejected"] += rejected
            totals["responses"] += chosen + rejected
            totals["tokens"] += len(dialogue.ids)
            length = dialogue.num_predicted
            totals["chosen tokens"] += chosen * length
            totals["nll tokens"] += chosen * (
                len(dialogue.ids) - 1 if options.kind.nll_has_prompt else length
            )
        decided = sum(pair.is_label for pair in row.pairs)
        totals["decided"] += decided if options.is_paired else len(row.ranks)
        totals["losses"] += 1 if options.is_paired else len(row.ranks)
    return totals


def micro_batches(examples: Sequence[Example], options: DirectOptions) -> list[tuple[list[int], bool]]:
    """Divide records into micro-batches; see `batches_of_rank`."""
    lengths = [max(example.row.lengths) for example in examples]
    shapes = [(len(example.row.ranks), example.width) for example in examples]
    return batches_of_rank(lengths, micro_batch(options), shapes)


def _pairs(micro: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the `WeightedPair`s of a micro-batch, by index among its N responses, as tensors (P,)."""
    pairs, start = [], 0
    for row in (example.row for example in micro):
        pairs += [(start + pair.better, start + pair.worse, pair.weight, pair.is_label) for pair in row.pairs]
        start += len(row.ranks)
    better, worse, weights, is_label = zip(*pairs, strict=True)
    return _tensor(better).long(), _tensor(worse).long(), _tensor(weights), _tensor(is_label)


def _tensor(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device())
