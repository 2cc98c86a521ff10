"""Direct preference optimisation in plain PyTorch: one function per loss, after its paper.

A record is a prompt with a better and a worse response, or with ranked ones; all pairs weigh the same, and a
tie counts half in both orders.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.recomputed.plain import Optimiser, all_logits, load, rate_factor, response_logprobs

log_sigmoid = torch.nn.functional.logsigmoid


class Answer(NamedTuple):
    """Token ids of a prompt and a response, and where the response starts."""

    ids: list[int]
    start: int

    @property
    def length(self) -> int:
        return len(self.ids) - self.start


class Order(NamedTuple):
    """A pair of responses of a record in one order."""

    better: int
    worse: int
    weight: float
    is_tie: bool


class Compared(NamedTuple):
    """Responses to a prompt, best first; equal ranks are ties."""

    answers: list[Answer]
    ranks: list[int]

    @property
    def orders(self) -> list[Order]:
        pairs = list(combinations(range(len(self.ranks)), 2))
        orders = []
        for i, j in pairs:
            if self.ranks[i] == self.ranks[j]:
                orders += [Order(i, j, 0.5 / len(pairs), True), Order(j, i, 0.5 / len(pairs), True)]
            else:
                orders.append(Order(i, j, 1 / len(pairs), False))
        return orders


def dpo(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Rafailov et al. 2023, eq. 7, with the label wrong with probability e (Mitchell 2023)."""
    e, x = o.get("label_smoothing", 0.0), o["beta"] * d
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def robust(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Chowdhury et al. 2024, eq. 12."""
    e, x = o["label_smoothing"], o["beta"] * d
    return ((1 - e) * -log_sigmoid(x) - e * -log_sigmoid(-x)) / (1 - 2 * e)


def hinge(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Liu et al. 2024 (RSO), eq. 9."""
    return max(d * 0, 1 - o["beta"] * d)


def ipo(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Azar et al. 2023, eq. 17."""
    return (d - 0.5 / o["beta"]) ** 2


def simpo(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Meng et al. 2024, eq. 6, with gamma = ratio x beta."""
    return dpo(d - o["gamma_beta_ratio"], o)


def simpo_hinge(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    return hinge(d - o["gamma_beta_ratio"], o)


def exo(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Ji et al. 2024, eq. 16: the divergence of two distributions over the two responses."""
    q = torch.softmax(torch.stack([o["beta"] * d, d * 0]), dim=0)
    p = torch.tensor([1 - o["label_smoothing"], o["label_smoothing"]])
    return (q * (q / p).log()).sum()


def discopop(d: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Lu et al. 2024, eq. 5."""
    x = o["beta"] * d
    mixture = 1 / (1 + torch.exp(-x / o["discopop_temperature"]))
    return (1 - mixture) * torch.log(1 + torch.exp(-x)) + mixture * torch.exp(-x)


# Of the difference of two rewards.
PAIR_LOSSES: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {
    "dpo": dpo, "robust": robust, "hinge": hinge, "ipo": ipo, "simpo": simpo, "cpo": dpo,
    "simpo_hinge": simpo_hinge, "cpo_hinge": hinge, "sigmoid_norm": dpo, "exo_pair": exo,
    "discopop": discopop,
}  # fmt: skip
WITHOUT_REFERENCE = {"simpo", "simpo_hinge", "cpo", "cpo_hinge", "orpo"}
WITH_MEANS = {"ipo", "simpo", "simpo_hinge", "orpo", "sigmoid_norm"}


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def nca(c: Tensor, r: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Chen et al. 2024."""
    right, wrong = sigmoid(o["beta"] * c), sigmoid(o["beta"] * r)
    return -torch.log(right) - (torch.log(1 - right) + torch.log(1 - wrong)) / 2


def bco(c: Tensor, r: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Jung et al. 2024, with the shift delta / beta."""
    right, wrong = (sigmoid(o["beta"] * (side - o["shift"])) for side in (c, r))
    return -torch.log(right) - torch.log(1 - wrong)


def sppo(c: Tensor, r: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Wu et al. 2024, eq. 4.7: probabilities of winning of 1 and 0."""
    return sum((side - (wins - 0.5) / o["beta"]) ** 2 for side, wins in ((c, 1), (r, 0)))


def apo_zero(c: Tensor, r: Tensor, o: Mapping[str, Any]) -> Tensor:
    """D'Oosterlinck et al. 2024, eq. 7."""
    return 1 - sigmoid(o["beta"] * c) + sigmoid(o["beta"] * r)


def apo_down(c: Tensor, r: Tensor, o: Mapping[str, Any]) -> Tensor:
    """D'Oosterlinck et al. 2024, eq. 8."""
    return sigmoid(o["beta"] * c) + 1 - sigmoid(o["beta"] * (c - r))


def orpo(better: Tensor, worse: Tensor, o: Mapping[str, Any]) -> Tensor:
    """Hong et al. 2024, eq. 6 and 7, from mean log-probabilities."""
    odds = [logprob.exp() / (1 - logprob.exp()) for logprob in (better, worse)]
    return -o["beta"] * log_sigmoid(torch.log(odds[0] / odds[1]))


# Of two rewards.
TWO_SIDED: dict[str, Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]] = {
    "orpo": orpo, "nca_pair": nca, "bco_pair": bco, "sppo_hard": sppo, "apo_zero": apo_zero,
    "apo_down": apo_down,
}  # fmt: skip


def aot(pairs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], o: Mapping[str, Any]) -> Tensor:
    """Melnyk et al. 2024: the sum over sorted pairs, from log-probabilities of policy and reference."""
    chosen, rejected, old_chosen, old_rejected = map(torch.stack, zip(*pairs, strict=True))
    if o["loss"] == "aot":
        d = (chosen - rejected).sort().values - (old_chosen - old_rejected).sort().values
    else:
        d = (chosen - old_chosen).sort().values - (rejected - old_rejected).sort().values
    return dpo(d, o).sum()


def reward(log_ratio: Tensor, length: int, o: Mapping[str, Any]) -> Tensor:
    """What a loss compares, up to beta: f-DPO (Wang et al. 2023, table 1), means, AlphaPO."""
    t = log_ratio.double().exp()  # differences of powers near 1 cancel
    match o.get("f_divergence", "reverse_kl"):
        case "reverse_kl":
            value = log_ratio
        case "forward_kl":
            value = 1 - 1 / t
        case "js_divergence":
            value = torch.log(2 * t / (1 + t))
        case "alpha_divergence":
            power = o["f_divergence_alpha"] - 1
            value = (t**power - 1) / power
    value = value.float() / (length if o["loss"] in WITH_MEANS else 1)
    alpha = o.get("alphapo_alpha", 0.0)
    return (1 - value.exp() ** -alpha) / alpha if alpha else value


def weighted_sum(logprobs: Tensor, record: Compared, o: Mapping[str, Any]) -> Tensor:
    """LD-DPO, Liu et al. 2024: tokens beyond the shortest response weigh alpha."""
    shared = min(answer.length for answer in record.answers)
    return logprobs[:shared].sum() + o.get("ld_alpha", 1.0) * logprobs[shared:].sum()


@torch.no_grad()
def likelihood_weight(model: LlamaForCausalLM, answer: Answer) -> float:
    """WPO, Zhou et al. 2024, eq. 2: the policy's probabilities, relative to those it draws on average."""
    p = torch.softmax(all_logits(model, answer.ids), dim=-1)[answer.start - 1 : -1]
    drawn = p.gather(1, torch.tensor(answer.ids[answer.start :])[:, None])[:, 0]
    return (drawn / (p**2).sum(dim=1)).log().mean().exp().item()


def train(
    paths: tuple[str, str],
    records: Sequence[Compared],
    held_out: Sequence[Compared],
    options: Mapping[str, Any],
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """Every step trains on all records. paths: of the model and of the reference."""
    (model, reference), steps = map(load, paths), options["max_steps"]
    optimiser = Optimiser(model, (0.9, 0.95), options["adam_epsilon"], options["weight_decay"])
    options, means = {**options, "shift": 0.0}, []
    lines = [evaluation(model, reference, held_out, options, 0)]
    for step in range(steps):
        rate = options["learning_rate"] * rate_factor(options["lr_scheduler_type"], step, steps)
        loss, metrics = losses(model, reference, records, options)
        if options.get("bco_shift"):
            metrics["reward/shift"] = options["beta"] * options["shift"]
            means.append((metrics["reward/chosen"] + metrics["reward/rejected"]) / 2 / options["beta"])
            options["shift"] = sum(means) / len(means)
        norm = optimiser.step(loss, rate, options["max_grad_norm"])
        lines.append({
            **metrics, "step": step + 1, "train/loss": loss.item(), "train/lr": rate, "train/grad_norm": norm,
            "train/skipped_updates": 0,
        })  # fmt: skip
    return model, [*lines, evaluation(model, reference, held_out, options, steps)]


def losses(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    records: Sequence[Compared],
    options: Mapping[str, Any],
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step and its metrics."""
    loss, right, decided = 0.0, 0, 0
    sides = {"chosen": [], "rejected": []}  # weight, compared, log-probability, log-ratio, length
    nats, nll_tokens, pairs = 0.0, 0.0, []
    for record in records:
        tokens = [response_logprobs(model, answer.ids, answer.start) for answer in record.answers]
        logprobs = [values.sum() for values in tokens]
        ratios, before = [weighted_sum(values, record, options) for values in tokens], [0.0] * len(tokens)
        if options["loss"] not in WITHOUT_REFERENCE:
            with torch.no_grad():
                before = [response_logprobs(reference, *answer) for answer in record.answers]
                before = [weighted_sum(values, record, options) for values in before]
            ratios = [now - old for now, old in zip(ratios, before, strict=True)]
        compared = [reward(r, one.length, options) for r, one in zip(ratios, record.answers, strict=True)]
        likely = [1.0] * len(tokens)
        if options.get("wpo"):
            likely = [likelihood_weight(model, answer) for answer in record.answers]
        for order in record.orders:
            better, worse = compared[order.better], compared[order.worse]
            one = 0.0
            if options["loss"] in ("aot", "aot_unpaired"):
                now = [ratios[i] + before[i] for i in order[:2]]
                pairs.append((*now, before[order.better], before[order.worse]))
            elif options["loss"] in TWO_SIDED:
                one = TWO_SIDED[options["loss"]](better, worse, options)
            else:
                one = PAIR_LOSSES[options["loss"]](better - worse, options)
            loss = loss + order.weight * likely[order.better] * likely[order.worse] * one
            if not order.is_tie:
                decided += 1
                right += 1.0 if better > worse else 0.5 if better == worse else 0.0
            for side, number in (("chosen", order.better), ("rejected", order.worse)):
                numbers = compared[number], logprobs[number], ratios[number]
                length = record.answers[number].length
                sides[side].append((order.weight, *(value.item() for value in numbers), length))
            answer = record.answers[order.better]
            start = 1 if options["loss"] == "orpo" else answer.start
            nats = nats - order.weight * response_logprobs(model, answer.ids, start).sum()
            nll_tokens += order.weight * (len(answer.ids) - start)
    if pairs:
        loss = aot(pairs, options)
    loss = loss / len(records)
    if options["loss"] in ("orpo", "cpo", "cpo_hinge"):
        loss = loss + options["nll_coef"] * nats / nll_tokens
    means = {
        side: [sum(row[0] * row[column] for row in rows) / sum(row[0] for row in rows) for column in (1, 2)]
        for side, rows in sides.items()
    }
    both, chosen = sides["chosen"] + sides["rejected"], sides["chosen"]
    metrics = {
        "train/accuracy": right / decided,
        "train/nll_chosen": -sum(row[0] * row[2] for row in chosen) / sum(row[0] * row[4] for row in chosen),
        "reward/chosen": options["beta"] * means["chosen"][0],
        "reward/rejected": options["beta"] * means["rejected"][0],
        "reward/margin": options["beta"] * (means["chosen"][0] - means["rejected"][0]),
        "logprobs/chosen": means["chosen"][1], "logprobs/rejected": means["rejected"][1],
    }  # fmt: skip
    if options["loss"] not in WITHOUT_REFERENCE:
        metrics["logratio/mean"] = sum(row[0] * row[3] for row in both) / sum(row[0] for row in both)
    return loss, metrics


@torch.no_grad()
def evaluation(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, records: Sequence[Compared],
    options: Mapping[str, Any], step: int,
) -> dict[str, float]:  # fmt: skip
    loss, metrics = losses(model, reference, records, options)
    return {
        "step": step, "eval/loss": loss.item(), "eval/accuracy": metrics["train/accuracy"],
        "eval/margin": metrics["reward/margin"], "eval/nll_chosen": metrics["train/nll_chosen"],
    }  # fmt: skip


class Labelled(NamedTuple):
    """A response that is desirable or not, and the prompt with a response to another prompt."""

    answer: Answer
    is_desirable: bool
    unrelated: Answer | None  # of kto


def train_kto(
    paths: tuple[str, str],
    records: Sequence[Labelled],
    held_out: Sequence[Labelled],
    options: Mapping[str, Any],
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """Kahneman-Tversky optimisation: Ethayarajh et al. 2024, section 4; APO-zero is without the point."""
    (model, reference), steps = map(load, paths), options["max_steps"]
    optimiser = Optimiser(model, (0.9, 0.95), options["adam_epsilon"], options["weight_decay"])

    def evaluation(step: int) -> dict[str, float]:
        with torch.no_grad():
            loss, metrics = kto(model, reference, held_out, options)
        names = {"accuracy": "train/accuracy", "margin": "reward/margin", "nll_chosen": "train/nll_chosen"}
        return {"step": step, "eval/loss": loss.item(), **{f"eval/{n}": metrics[m] for n, m in names.items()}}

    lines = [evaluation(0)]
    for step in range(steps):
        rate = options["learning_rate"] * rate_factor(options["lr_scheduler_type"], step, steps)
        loss, metrics = kto(model, reference, records, options)
        norm = optimiser.step(loss, rate, options["max_grad_norm"])
        lines.append({
            **metrics, "step": step + 1, "train/loss": loss.item(), "train/lr": rate, "train/grad_norm": norm,
            "train/skipped_updates": 0,
        })  # fmt: skip
    return model, [*lines, evaluation(steps)]


def kto(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    records: Sequence[Labelled],
    options: Mapping[str, Any],
) -> tuple[Tensor, dict[str, float]]:
    def ratio(answer: Answer) -> tuple[Tensor, Tensor]:
        now = response_logprobs(model, *answer).sum()
        return now, now - response_logprobs(reference, *answer).sum().detach()

    point = 0.0
    if options["loss"] == "kto":
        point = max(0.0, sum(ratio(record.unrelated)[1].item() for record in records) / len(records))
    loss, right = 0.0, 0.0
    sides: dict[bool, list[tuple[float, float, int]]] = {True: [], False: []}
    for record in records:
        logprob, r = ratio(record.answer)
        weight = options["desirable_weight" if record.is_desirable else "undesirable_weight"]
        sign = 1 if record.is_desirable else -1
        loss = loss + weight * (1 - 1 / (1 + torch.exp(-options["beta"] * sign * (r - point))))
        difference = sign * (r.item() - point)
        right += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        sides[record.is_desirable].append((r.item(), logprob.item(), record.answer.length))
    chosen, rejected = ([*zip(*sides[side], strict=True)] for side in (True, False))
    reward = [options["beta"] * sum(side[0]) / len(side[0]) for side in (chosen, rejected)]
    return loss / len(records), {
        "train/accuracy": right / len(records), "train/nll_chosen": -sum(chosen[1]) / sum(chosen[2]),
        "reward/chosen": reward[0], "reward/rejected": reward[1], "reward/margin": reward[0] - reward[1],
        "logprobs/chosen": sum(chosen[1]) / len(chosen[1]),
        "logprobs/rejected": sum(rejected[1]) / len(rejected[1]),
        "logratio/mean": math.fsum((*chosen[0], *rejected[0])) / len(records),
        **({"kl/reference_point": point} if options["loss"] == "kto" else {}),
    }  # fmt: skip
