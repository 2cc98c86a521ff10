"""Loss and metrics of a batch of records, in training and evaluation."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.data.batching import batches_of_rank, micro_batch
from common.model.engine import backward_and_step
from common.model.engine_protocol import Engine
from common.runtime.distributed import device, sum_over_ranks
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.training.expert_use import ExpertUse
from common.training.means import Mean
from step2_reward.direct.data import Choice, Example
from step2_reward.direct.logprobs import ResponsePass, compared_logprobs, response_logprobs
from step2_reward.direct.loss import kto_loss
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.pair_losses import compared_values, pair_losses
from step2_reward.direct.rewards import wpo_weights
from step2_reward.direct.transport import with_partners

# The total of `global_totals` that each metric is divided by.
DIVISORS = {
    "loss": "losses", "accuracy": "decided", "nll_chosen": "chosen tokens", "reward/chosen": "chosen",
    "reward/rejected": "rejected", "logprobs/chosen": "chosen", "logprobs/rejected": "rejected",
    "logratio/mean": "responses",
}  # fmt: skip


def check_accuracy(options: DirectOptions, held_out: Sequence[Choice]) -> None:
    """Raise UserError when --best_metric is eval/accuracy and all held-out pairs are ties."""
    if options.best_metric != "eval/accuracy" or not options.is_paired:
        return
    if not any(pair.is_label for row in held_out for pair in row.pairs):
        raise UserError(
            "--best_metric eval/accuracy: the held-out pairs are all ties; allowed: none or eval/loss"
        )


def evaluate(
    engine: Engine, examples: Sequence[Example], options: DirectOptions, shift: float = 0.0
) -> dict[str, float]:
    """Compute loss, accuracy, reward margin, and negative log-likelihood per token of chosen responses."""
    engine.eval()
    with torch.no_grad():
        metrics, _ = batch_metrics(
            engine, examples, options, train=False, shift=shift, title="evaluating records"
        )
    engine.train()
    names = {"loss": "loss", "accuracy": "accuracy", "reward/margin": "margin", "nll_chosen": "nll_chosen"}
    return {f"eval/{short}": metrics[name].value for name, short in names.items() if name in metrics}


def batch_metrics(
    engine: Engine, examples: Sequence[Example], options: DirectOptions, train: bool,
    shift: float = 0.0, title: str = "",
) -> tuple[dict[str, Mean], float | None]:  # fmt: skip
    """Compute the metrics of a global batch; with `train`, also take an optimiser step, and return its
    gradient norm.

    Accuracy: share of pairs whose better response has the higher reward, without ties, and with soft labels
    rounded; of single responses, the share on the right side of the reference point. In all other metrics a
    tie or a soft label counts each response on both sides, by its probability. Rewards are beta times the
    values that the loss compares (see `compared_values`).

    logratio/mean is the mean log-ratio of policy and reference per response of the data, in nats. It is no
    estimate of their KL, which needs responses of the policy (launch/evaluate_ppo.sh). KTO's estimate is
    kl/reference_point.

    shift: see `RewardShift`. title: of the progress lines; empty: none.
    """
    totals = global_totals(examples, options)
    point = reference_point(engine, examples, options) if options.kind.has_point else shift
    if options.kind.is_sorted:
        examples = with_partners(engine, examples, options)
    batches = micro_batches(examples, options)
    sums: Counter[str] = Counter()
    norm = None

    def measure(indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return micro_batch_loss(engine, [examples[i] for i in indices], totals, point, options)

    experts = ExpertUse(engine, measure, *zip(*batches, strict=True)) if train else None
    for number, (batch_indices, is_real) in enumerate(track(title, batches, len(examples)), start=1):
        loss, parts = measure(batch_indices)
        if experts:
            loss = loss + experts.loss(is_real)
            norm = backward_and_step(engine, loss, world_size(), is_last=number == len(batches))
        for name, value in parts.items():
            sums[name] += value.detach() * is_real
    means = dict(zip(sums, sum_over_ranks(*sums.values()), strict=True))
    divisors = {name: totals[DIVISORS[name]] for name in means}
    metrics = {name: Mean(value * divisors[name], divisors[name]) for name, value in means.items()}
    if {"reward/chosen", "reward/rejected"} <= means.keys():
        metrics["reward/margin"] = Mean(means["reward/chosen"] - means["reward/rejected"])
    if options.kind.has_point:
        metrics["kl/reference_point"] = Mean(point)
    return metrics | (experts.metrics() if experts else {}), norm


def micro_batch_loss(
    engine: Engine, micro: Sequence[Example], totals: dict[str, float], point: float, options: DirectOptions,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Compute a micro-batch's share of loss and metrics of the global batch (see `global_totals`).

    point: subtracted from what the loss compares, if it compares no differences.
    """
    kind, rows = options.kind, [example.row for example in micro]
    dialogues = [dialogue for row in rows for dialogue in row.dialogues]
    sides = [side for row in rows for side in row.sides(options.is_paired)]
    with_prompt = [kind.nll_has_prompt and chosen > 0 for chosen, _ in sides]
    entropy = "collision" if options.wpo else "none"
    responses = response_logprobs(engine, dialogues, with_prompt, entropy)  # N of them
    chosen, rejected = _tensor(sides).unbind(1)  # (N,) each
    reference = _tensor([value for example in micro for value in example.logprobs])
    log_ratios = compared_logprobs(responses, rows, options) - reference
    lengths = [d.num_predicted for d in dialogues]
    compared = compared_values(log_ratios, _tensor(lengths), options)
    if options.is_paired:
        losses, right = _of_pairs(micro, compared, point, responses, options)
    else:
        losses, right = _of_single_responses(compared, sides, point, options)
    loss = losses.sum() / totals["losses"]
    if kind.has_nll:
        nll = -(chosen * responses.sums_with_prompt).sum()
        loss = loss + options.nll_coef * nll / totals["nll tokens"]
    logprobs = responses.sums
    sums = {
        "accuracy": right.sum(),
        "nll_chosen": -(chosen * logprobs).sum(),
        "reward/chosen": options.beta * (chosen * compared).sum(),
        "reward/rejected": options.beta * (rejected * compared).sum(),
        "logprobs/chosen": (chosen * logprobs).sum(),
        "logprobs/rejected": (rejected * logprobs).sum(),
    }
    if kind.has_reference:
        sums["logratio/mean"] = ((chosen + rejected) * log_ratios).sum()
    parts = {name: value / totals[DIVISORS[name]] for name, value in sums.items() if totals[DIVISORS[name]]}
    return loss, {"loss": loss} | parts


def _of_pairs(
    micro: Sequence[Example], compared: Tensor, point: float, responses: ResponsePass, options: DirectOptions
) -> tuple[Tensor, Tensor]:
    """Weighted loss of each pair, (P,), and whether it is right: compared (N,), of their responses."""
    better, worse, weights, is_label = _pairs(micro)  # (P,) each
    partners = _tensor([partner for example in micro for partner in example.partners])  # (P, 2)
    if options.wpo:
        likely = wpo_weights(responses.tokens, responses.entropy, responses.is_response)  # (N,)
        weights = weights * likely[better] * likely[worse]
    losses = weights * pair_losses(compared[better] - point, compared[worse] - point, options, partners)
    return losses, _is_right(compared[better] - compared[worse]) * is_label


def _of_single_responses(
    compared: Tensor, sides: Sequence[tuple[float, float]], point: float, options: DirectOptions
) -> tuple[Tensor, Tensor]:
    """Weighted loss of each response, (N,), and whether it is right; sides: its probability of each label."""
    desirable, undesirable = _tensor(sides).unbind(1)
    weights = options.desirable_weight, options.undesirable_weight
    is_desirable = torch.ones_like(desirable, dtype=torch.bool)
    losses = desirable * kto_loss(compared, is_desirable, point, options.beta, weights)
    losses = losses + undesirable * kto_loss(compared, ~is_desirable, point, options.beta, weights)
    return losses, _is_right(torch.where(desirable > undesirable, 1.0, -1.0) * (compared - point))


def _is_right(differences: Tensor) -> Tensor:
    """1 above 0, and a half at 0."""
    return (differences > 0) + 0.5 * (differences == 0)


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
        responses = response_logprobs(engine, [example.unrelated for example in micro])
        log_ratios = responses.sums - _tensor([example.unrelated_logprob for example in micro])  # (B,)
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
