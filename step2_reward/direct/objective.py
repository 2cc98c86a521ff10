"""Loss and figures of a batch of records: to learn from it, or to look at held-out ones."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, assert_never

import torch
from torch import Tensor

from common.data.batching import deal
from common.model.engine import backward_and_step
from common.model.forward import base_model
from common.model.load_balancing import has_balance_loss
from common.runtime.distributed import device, rank, sum_over_ranks
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.training.means import Mean
from step2_reward.direct.data import Choice
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
from step2_reward.direct.reference import Example

# What each figure is a mean over, by the names of `count`.
COUNTED = {
    "loss": "losses", "accuracy": "decided", "nll_chosen": "chosen tokens", "reward/chosen": "chosen",
    "reward/rejected": "rejected", "logprobs/chosen": "chosen", "logprobs/rejected": "rejected",
    "logratio/mean": "responses", "aux_loss": "tokens",
}  # fmt: skip


def check_accuracy(options: DirectOptions, held_out: Sequence[Choice]) -> None:
    """Raise UserError when --best_metric eval/accuracy has no pair to be measured on."""
    if options.best_metric != "eval/accuracy" or not options.is_paired:
        return
    if not any(pair.is_label for row in held_out for pair in row.pairs):
        raise UserError(
            "--best_metric eval/accuracy: the held-out pairs are all ties; eval/loss is of them too"
        )


def evaluate(
    engine: Any, examples: Sequence[Example], options: DirectOptions, pad_token_id: int
) -> dict[str, float]:
    """Loss, accuracy, margin of the rewards, and negative log-likelihood of a chosen token."""
    engine.eval()
    with torch.no_grad():
        found, _ = measure(engine, examples, options, pad_token_id, learn=False, title="evaluating records")
    engine.train()
    names = {"loss": "loss", "accuracy": "accuracy", "reward/margin": "margin", "nll_chosen": "nll_chosen"}
    return {f"eval/{short}": found[name].value for name, short in names.items() if name in found}


def measure(
    engine: Any, examples: Sequence[Example], options: DirectOptions, pad_token_id: int, learn: bool,
    title: str = "",
) -> tuple[dict[str, Mean], float | None]:  # fmt: skip
    """Figures of a global batch, of which this rank reads its micro-batches; after `learn`, an optimiser step
    on it, also the norm of its gradients.

    Accuracy: pairs of which the better one has the higher reward, ties left out, soft labels taken as hard;
    in KTO, responses on the right side of the reference point. In all other figures responses of a tie or of
    a soft label count on both sides, by its probability. Rewards are beta times what the loss compares.

    logratio/mean is the mean log-ratio of policy and reference, in nats per response, over the responses of
    the data: below 0 where the policy makes them rarer. It is no estimate of the KL of policy and reference:
    that needs responses of the policy (launch/evaluate_ppo.sh draws them). What KTO takes for one, its
    reference point, is kl/reference_point.

    title: of progress lines, none: be silent.
    """
    totals = count(examples, options)
    point = 0.0 if options.is_paired else reference_point(engine, examples, options, pad_token_id)
    mine = micro_batches(examples, options)
    sums: Counter[str] = Counter()
    norm = None
    for number, picked in enumerate(track(title, mine, len(examples)), start=1):
        # A rank may be left without records in a round. It takes part for nothing: ZeRO needs every rank.
        micro = [examples[i] for i in picked or [0]]
        loss, figures = share(engine, micro, totals, point, options, pad_token_id)
        if learn:
            norm = backward_and_step(engine, loss, world_size(), is_last=number == len(mine))
        for name, value in figures.items():
            sums[name] += value.detach() * bool(picked)
    shares = dict(zip(sums, sum_over_ranks(*sums.values()), strict=True))
    counts = {name: totals[COUNTED[name]] for name in shares}
    found = {name: Mean(value * counts[name], counts[name]) for name, value in shares.items()}
    if {"reward/chosen", "reward/rejected"} <= shares.keys():
        found["reward/margin"] = Mean(shares["reward/chosen"] - shares["reward/rejected"])
    return found if options.is_paired else found | {"kl/reference_point": Mean(point)}, norm


def share(
    engine: Any, micro: Sequence[Example], totals: dict[str, float], point: float, options: DirectOptions,
    pad_token_id: int,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """What a micro-batch adds to the loss and to the figures of the global batch; see `count`."""
    kind = options.kind
    dialogues = [dialogue for example in micro for dialogue in example.row.dialogues]
    sides = [side for example in micro for side in example.row.sides(options.is_paired)]
    is_whole = [kind.nll_has_prompt and chosen > 0 for chosen, _ in sides]
    logprobs, read, balance = response_logprobs(engine, dialogues, pad_token_id, is_whole)  # (N,), (N,), ()
    chosen, rejected = _tensor(sides).unbind(1)  # (N,) each
    log_ratios = logprobs - _tensor([value for example in micro for value in example.logprobs])
    compared = log_ratios / _tensor([d.count for d in dialogues]) if kind.is_averaged else log_ratios
    if options.is_paired:
        better, worse, weights, is_label = _pairs(micro)  # (P,) each
        differences = compared[better] - compared[worse]
        losses = weights * pair_losses(compared[better], compared[worse], options)
    else:
        is_desirable, is_label = chosen > rejected, torch.ones_like(chosen)
        differences = torch.where(is_desirable, 1.0, -1.0) * (log_ratios - point)
        ways = options.desirable_weight, options.undesirable_weight
        good = torch.ones_like(is_desirable)
        losses = chosen * kto_loss(log_ratios, good, point, options.beta, ways)
        losses = losses + rejected * kto_loss(log_ratios, ~good, point, options.beta, ways)
    right = ((differences > 0) + 0.5 * (differences == 0)) * is_label
    loss = losses.sum() / totals["losses"]
    if kind.has_nll:
        loss = loss - options.nll_coef * (chosen * read).sum() / totals["read"]
    loss = loss + balance / totals["tokens"]
    figures = {
        "accuracy": right.sum(),
        "nll_chosen": -(chosen * logprobs).sum(),
        "reward/chosen": options.beta * (chosen * compared).sum(),
        "reward/rejected": options.beta * (rejected * compared).sum(),
        "logprobs/chosen": (chosen * logprobs).sum(),
        "logprobs/rejected": (rejected * logprobs).sum(),
    }
    if engine.training and has_balance_loss(base_model(engine)):
        figures["aux_loss"] = balance
    if kind.has_reference:
        figures["logratio/mean"] = ((chosen + rejected) * log_ratios).sum()
    counted = {name: value for name, value in figures.items() if totals[COUNTED[name]]}
    return loss, {"loss": loss} | {name: value / totals[COUNTED[name]] for name, value in counted.items()}


def pair_losses(chosen: Tensor, rejected: Tensor, options: DirectOptions) -> Tensor:
    """The loss of each pair, (P,), from what its responses score, (P,) each."""
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
def reference_point(
    engine: Any, examples: Sequence[Example], options: DirectOptions, pad_token_id: int
) -> float:
    """z0 of KTO: the mean log-ratio of policy and reference of unrelated responses to the prompts, or 0.

    Source: Ethayarajh et al. 2024, section 4. Its authors' code takes responses and mean from a micro-batch;
    here the mean is over the global batch, found in a pass before the one that learns.
    """
    was_training = engine.training
    engine.eval()
    total = 0.0
    for picked in micro_batches(examples, options):
        micro = [examples[i] for i in picked or [0]]
        logprobs, *_ = response_logprobs(engine, [example.unrelated for example in micro], pad_token_id)
        log_ratios = logprobs - _tensor([example.unrelated_logprob for example in micro])  # (B,)
        total = total + log_ratios.sum() * bool(picked)
    engine.train(was_training)
    return max(0.0, sum_over_ranks(total)[0] / len(examples))


def count(examples: Sequence[Example], options: DirectOptions) -> dict[str, float]:
    """What the sums over a global batch are divided by; every rank has the whole batch, and counts alike."""
    totals: Counter[str] = Counter()
    for row in (example.row for example in examples):
        for dialogue, (chosen, rejected) in zip(row.dialogues, row.sides(options.is_paired), strict=True):
            totals["chosen"] += chosen
            totals["rejected"] += rejected
            totals["responses"] += chosen + rejected
            totals["tokens"] += len(dialogue.ids)
            totals["chosen tokens"] += chosen * dialogue.count
            whole = len(dialogue.ids) - 1 if options.kind.nll_has_prompt else dialogue.count
            totals["read"] += chosen * whole
        decided = sum(pair.is_label for pair in row.pairs)
        totals["decided"] += decided if options.is_paired else len(row.ranks)
        totals["losses"] += 1 if options.is_paired else len(row.ranks)
    return totals


def micro_batches(examples: Sequence[Example], options: DirectOptions) -> list[list[int]]:
    """This rank's micro-batches of records, the same number on every rank."""
    lengths = [max(example.row.lengths) for example in examples]
    return deal(range(len(examples)), lengths, options.micro_batch_size, rank(), world_size())


def _pairs(micro: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs of a micro-batch, in the order of `Pair`, by places among its N responses; (P,) each."""
    pairs, start = [], 0
    for row in (example.row for example in micro):
        pairs += [(start + pair.better, start + pair.worse, pair.weight, pair.is_label) for pair in row.pairs]
        start += len(row.ranks)
    better, worse, weights, is_label = zip(*pairs, strict=True)
    return _tensor(better).long(), _tensor(worse).long(), _tensor(weights), _tensor(is_label)


def _tensor(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device())
