"""Losses and metrics of a micro-batch, against TRL and closed forms."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from step2_reward.direct.data import Choice, Dialogue
from step2_reward.direct.logprobs import logprobs_of_all, response_logprobs
from step2_reward.direct.objective import global_totals, micro_batch_loss, reference_point
from step2_reward.direct.options import KINDS, DirectOptions
from step2_reward.direct.reference import Example, ReferencedExamples
from step2_reward.direct.transport import with_partners
from tests.conftest import assert_close


class FixedLogits(nn.Module):
    """A model with fixed logits (N, T, V) for any input."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.states, self.head = logits, nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
        self.head.weight.data = torch.eye(logits.shape[-1])
        self.config = PretrainedConfig(pad_token_id=0)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.states[:, : input_ids.shape[1]]))


class Random(FixedLogits):
    """A model with random logits that depend only on the last token."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.zeros(1, 1, 50))
        self.table = torch.randn(50, 50, generator=torch.Generator().manual_seed(seed))

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.table[input_ids]))

    def logprob(self, dialogue: Dialogue) -> float:
        """Sum over the tokens of the response."""
        ids, table = dialogue.ids, self.table.log_softmax(-1)
        return sum(float(table[ids[t - 1], ids[t]]) for t in range(max(dialogue.start, 1), len(ids)))


def settings(loss: str, **others) -> DirectOptions:
    options = DirectOptions(loss=loss, **others)
    options.check()
    return options


def choice(seed: int, ranks: list[float]) -> Choice:
    numbers = torch.Generator().manual_seed(seed)
    lengths = (torch.randint(3, 6, (len(ranks),), generator=numbers) + 2).tolist()
    ids = torch.randint(50, (sum(lengths),), generator=numbers).tolist()
    return Choice(ids, lengths, [2] * len(ranks), ranks)


def test_log_probabilities_match_the_authors(reference):
    case = reference("logps.authors.get_batch_logps")
    dialogues = [Dialogue([0, 3, 5, 1, 6, 2], 2), Dialogue([0, 3, 3, 2, 1], 3)]
    sums, *_ = response_logprobs(FixedLogits(case.inputs.logits), dialogues)
    assert_close(sums, case.outputs.sum)
    assert_close(sums / torch.tensor([d.num_predicted for d in dialogues]), case.outputs.average)


def test_orpo_includes_the_nll_of_prompt_and_chosen_response(reference):
    """The full loss and the gradient of every logit match TRL, which puts the chosen rows first."""
    case = reference("orpo.trl.b0.1")
    order = torch.tensor([0, 2, 1, 3])  # both responses of a record in a row
    lengths = case.inputs.attention_mask.sum(1)[order].tolist()
    starts = (case.inputs.labels == -100).int().cumprod(1).sum(1)[order].tolist()
    ids = [row[:n].tolist() for row, n in zip(case.inputs.input_ids[order], lengths, strict=True)]
    rows = [Choice(ids[i] + ids[i + 1], lengths[i : i + 2], starts[i : i + 2], [0.0, 1.0]) for i in (0, 2)]
    examples = [Example(row, [0.0, 0.0], None, 0.0) for row in rows]
    options = settings("orpo")
    logits = case.inputs.logits[order].requires_grad_()
    loss, _ = micro_batch_loss(FixedLogits(logits), examples, global_totals(examples, options), 0.0, options)
    loss.backward()
    assert_close(loss, case.outputs.loss)
    assert_close(logits.grad, case.outputs.grad_logits[order])


def test_a_tie_counts_half_each_way_and_not_in_accuracy():
    model, options = Random(0), settings("dpo", beta=0.5)
    row = choice(1, [0.0, 0.0])
    example = Example(row, [-3.0, -1.0], None, 0.0)
    totals = global_totals([example], options)
    loss, metrics = micro_batch_loss(model, [example], totals, 0.0, options)
    x, y = (model.logprob(d) - r for d, r in zip(row.dialogues, example.logprobs, strict=True))
    difference = torch.tensor(0.5 * (x - y))
    assert_close(loss, -0.5 * (difference.sigmoid().log() + (-difference).sigmoid().log()))
    assert "accuracy" not in metrics
    assert_close(metrics["reward/chosen"], metrics["reward/rejected"])

    both = [example, example._replace(row=choice(1, [0.0, 1.0]))]
    _, metrics = micro_batch_loss(model, both, global_totals(both, options), 0.0, options)
    assert metrics["accuracy"].item() == (x > y)


@pytest.mark.parametrize("loss", [loss for loss, kind in KINDS.items() if not kind.is_sorted])
def test_a_soft_label_gives_the_expected_loss_over_hard_labels(loss):
    """Loss, gradient and metrics are expectations, but accuracy is that of the more likely label."""
    options = settings(loss, beta=0.5)
    ids = torch.randint(50, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    reference = [value * options.kind.has_reference for value in (-3.0, -1.0)]
    likely = Choice(ids, [6, 6], [2, 2], [0.0, 1.0]), reference
    unlikely = likely[0]._replace(ids=ids[6:] + ids[:6]), reference[::-1]
    soft = {"probability": 0.8} if options.is_paired else {"ranks": [1 - 0.8, 0.8]}
    results, accuracies = [], []
    for row, logprobs in (likely, unlikely, (likely[0]._replace(**soft), reference)):
        model, example = Random(0), Example(row, logprobs, None, 0.0)
        value, metrics = micro_batch_loss(model, [example], global_totals([example], options), 0.3, options)
        value.backward()
        means = (metrics[name].detach() for name in ("nll_chosen", "reward/chosen", "logprobs/rejected"))
        results.append((value.detach(), model.head.weight.grad, *means))
        accuracies.append(metrics["accuracy"].item())
    for one, two, mixed in zip(*results, strict=True):
        assert_close(mixed, 0.8 * one + 0.2 * two)
    assert accuracies[2] == accuracies[0]


CHANGES = {
    "length": {"loss": "dpo", "ld_alpha": 0.3},
    "weights": {"loss": "dpo", "wpo": True},
    "weights of means": {"loss": "simpo", "wpo": True, "alphapo_alpha": 0.2},
    "divergence": {"loss": "robust", "f_divergence": "js_divergence", "label_smoothing": 0.1},
}


@pytest.mark.parametrize("loss", [*KINDS, *CHANGES])
def test_micro_batches_add_up_to_the_batch(loss):
    """Records with one, two and four responses; metrics computed by hand for two of them."""
    model, options = Random(0), settings(**CHANGES.get(loss, {"loss": loss}))
    ranks = (
        [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0, 1.0, 2.0]] if options.is_paired else [[0.0, 1.0], [1.0], [0.0]]
    )
    rows = [choice(seed, row_ranks) for seed, row_ranks in enumerate(ranks)]
    has_reference = options.kind.has_reference
    reference = [[Random(1).logprob(d) * has_reference for d in row.dialogues] for row in rows]
    examples = [Example(row, logprobs, None, 0.0) for row, logprobs in zip(rows, reference, strict=True)]
    totals = global_totals(examples, options)
    if options.kind.is_sorted:
        examples = with_partners(model, examples, options)
    total, metrics = micro_batch_loss(model, examples, totals, 0.3, options)
    parts = [micro_batch_loss(model, [example], totals, 0.3, options) for example in examples]
    assert_close(sum(loss for loss, _ in parts), total)
    for name in metrics:
        assert_close(sum(part[name] for _, part in parts), metrics[name])
    chosen = [
        (d, side[0])
        for row in rows
        for d, side in zip(row.dialogues, row.sides(options.is_paired), strict=True)
    ]
    nll = -sum(model.logprob(d) * weight for d, weight in chosen) / sum(
        d.num_predicted * weight for d, weight in chosen
    )
    assert metrics["nll_chosen"].item() == pytest.approx(nll, rel=1e-5)
    assert ("logratio/mean" in metrics) == has_reference


def test_cpo_adds_the_nll_of_the_chosen_response():
    model, options, row = Random(0), settings("cpo", nll_coef=0.7), choice(3, [0.0, 1.0])
    example = Example(row, [0.0, 0.0], None, 0.0)
    loss, _ = micro_batch_loss(model, [example], global_totals([example], options), 0.0, options)
    chosen, rejected = (model.logprob(d) for d in row.dialogues)
    preferred = torch.tensor(1 + math.exp(-0.1 * (chosen - rejected))).log()
    assert_close(loss, preferred - 0.7 * chosen / row.dialogues[0].num_predicted)


@pytest.mark.parametrize(("loss", "is_averaged"), [("simpo", True), ("ipo", True), ("dpo", False)])
def test_rewards_are_sums_or_means_over_tokens(loss, is_averaged):
    model, options, row = Random(0), settings(loss), choice(3, [0.0, 1.0])
    example = Example(row, [0.0, 0.0], None, 0.0)
    _, metrics = micro_batch_loss(model, [example], global_totals([example], options), 0.0, options)
    dialogue = row.dialogues[0]
    expected = options.beta * model.logprob(dialogue) / (dialogue.num_predicted if is_averaged else 1)
    assert metrics["reward/chosen"].item() == pytest.approx(expected, rel=1e-5)


def test_the_reference_point_is_the_mean_log_ratio_of_unrelated_responses():
    """It is the mean over the batch, the same for every micro-batch size, and at least 0."""
    policy, reference, options = Random(0), Random(1), settings("kto", max_length=6)
    rows = [choice(seed, [0.0]) for seed in range(6)]
    examples = ReferencedExamples(rows, options)
    prompts = [row.dialogues[0].ids[:2] for row in rows]
    unrelated = [examples[i].unrelated for i in range(6)]
    assert [d.ids[:2] for d in unrelated] == prompts and all(len(d.ids) <= 6 for d in unrelated)
    answers = [d.ids[2:] for row in rows for d in row.dialogues]
    sources = [next(j for j in range(6) if answers[j][: d.num_predicted] == d.ids[2:]) for d in unrelated]
    assert sorted(sources) == list(range(6)) and all(i != j for i, j in enumerate(sources))

    scored = [e._replace(unrelated_logprob=reference.logprob(e.unrelated)) for e in examples]
    mean = sum(policy.logprob(d) - reference.logprob(d) for d in unrelated) / 6
    for size in (1, 4):
        options.micro_batch_size = size
        point = reference_point(policy, scored, options)
        swapped = [
            e._replace(unrelated_logprob=2 * policy.logprob(e.unrelated) - e.unrelated_logprob)
            for e in scored
        ]
        swapped_point = reference_point(policy, swapped, options)
        assert sorted([point, swapped_point]) == pytest.approx([0.0, abs(mean)], rel=1e-5)


def test_unrelated_responses_are_desirable_and_undesirable_equally_often():
    pairs = [choice(seed, [0.0, 1.0]) for seed in range(300)]
    good, bad = ({tuple(row.dialogues[side].ids[2:]) for row in pairs} for side in (0, 1))
    drawn = [tuple(example.unrelated.ids[2:]) for example in ReferencedExamples(pairs, settings("kto"))]
    assert set(drawn) <= good | bad and 120 < sum(answer in bad for answer in drawn) < 180


def test_kto_weighs_each_response_by_its_label():
    options = settings("kto", beta=0.02, desirable_weight=2.0, undesirable_weight=0.7)
    model, example = Random(0), Example(choice(1, [0.0, 1.0]), [-3.0, -1.0], None, 0.0)
    loss, _ = micro_batch_loss(model, [example], global_totals([example], options), 0.3, options)
    good, bad = (model.logprob(d) - r for d, r in zip(example.row.dialogues, example.logprobs, strict=True))
    expected = 2.0 / (1 + math.exp(0.02 * (good - 0.3))) + 0.7 / (1 + math.exp(0.02 * (0.3 - bad)))
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_aot_sorts_over_the_global_batch(loss, micro):
    """Loss and gradient are those of sorted log-probabilities, whatever the micro-batches."""
    options = settings(loss, beta=0.3, label_smoothing=0.1, micro_batch_size=micro, global_batch_size=8)
    rows = [choice(seed, [0.0, 1.0]) for seed in range(8)]
    model, reference = Random(0), Random(1)
    old = torch.tensor([[reference.logprob(d) for d in row.dialogues] for row in rows])
    examples = [Example(row, values, None, 0.0) for row, values in zip(rows, old.tolist(), strict=True)]

    logprobs = model.head(model.table).log_softmax(-1)
    new = torch.stack([
        sum(logprobs[d.ids[t - 1], d.ids[t]] for t in range(d.start, len(d.ids)))
        for row in rows for d in row.dialogues
    ]).view(8, 2)  # fmt: skip
    if loss == "aot":
        d = (new[:, 0] - new[:, 1]).sort().values - (old[:, 0] - old[:, 1]).sort().values
    else:
        d = (new - old)[:, 0].sort().values - (new - old)[:, 1].sort().values
    expected = (-0.9 * (0.3 * d).sigmoid().log() - 0.1 * (-0.3 * d).sigmoid().log()).mean()
    (gradient,) = torch.autograd.grad(expected, model.head.weight)

    examples = with_partners(model, examples, options)
    totals = global_totals(examples, options)
    parts = [examples[i : i + micro] for i in range(0, 8, micro)]
    loss = sum(micro_batch_loss(model, part, totals, 0.0, options)[0] for part in parts)
    loss.backward()
    assert_close(loss, expected)
    assert_close(model.head.weight.grad, gradient)


def test_ld_alpha_weighs_policy_and_reference_alike():
    """alpha 0 compares as many tokens of either response; the log-probabilities logged are whole ones."""
    row = Choice([*range(2, 10), 1, *range(3, 8)], [9, 5], [2, 2], [0.0, 1.0])  # 7 and 3 tokens
    model, options = Random(0), settings("dpo", beta=0.3, ld_alpha=0.0)
    short = [d._replace(ids=d.ids[:5]) for d in row.dialogues]
    example = Example(row, [-4.0, -2.0], None, 0.0)
    loss, metrics = micro_batch_loss(model, [example], global_totals([example], options), 0.0, options)
    ratios = [model.logprob(d) - old for d, old in zip(short, example.logprobs, strict=True)]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3 * (ratios[0] - ratios[1]))), rel=1e-5)
    assert metrics["logprobs/chosen"].item() == pytest.approx(model.logprob(row.dialogues[0]), rel=1e-5)
    examples = ReferencedExamples([row], options)
    sums = logprobs_of_all(model, [*examples], 2, options)[0].tolist()
    assert sums == pytest.approx([model.logprob(d) for d in short], rel=1e-5)


def test_a_pair_weighs_what_the_policy_would_sample():
    model, plain, wpo = Random(0), settings("dpo", beta=0.3), settings("dpo", beta=0.3, wpo=True)
    example = Example(choice(1, [0.0, 1.0]), [-3.0, -1.0], None, 0.0)
    totals = global_totals([example], plain)
    loss, weighted = (micro_batch_loss(model, [example], totals, 0.0, options)[0] for options in (plain, wpo))
    weight, p = 1.0, model.table.softmax(-1)
    for d in example.row.dialogues:
        drawn = [p[d.ids[t - 1], d.ids[t]] / (p[d.ids[t - 1]] ** 2).sum() for t in range(d.start, len(d.ids))]
        weight *= math.prod(drawn) ** (1 / len(drawn))
    assert_close(weighted, weight * loss)
    slopes = [torch.autograd.grad(one, model.head.weight)[0] for one in (loss, weighted)]
    assert_close(slopes[1], weight * slopes[0])


def test_bco_compares_both_sides_with_the_point():
    model, options, row = Random(0), settings("bco_pair", beta=0.3), choice(3, [0.0, 1.0])
    example = Example(row, [-3.0, -1.0], None, 0.0)
    loss, _ = micro_batch_loss(model, [example], global_totals([example], options), 0.7, options)
    good, bad = (model.logprob(d) - r - 0.7 for d, r in zip(row.dialogues, example.logprobs, strict=True))
    expected = math.log(1 + math.exp(-0.3 * good)) + math.log(1 + math.exp(0.3 * bad))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
