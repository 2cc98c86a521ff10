"""Every loss and its gradients, against the authors' code, TRL or a closed form."""

import math

import pytest
import torch

from step2_reward.direct.loss import (
    aot_loss,
    aot_partners,
    aot_unpaired_partners,
    discopop_loss,
    dpo_loss,
    exo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
)
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.pair_losses import pair_losses
from tests.conftest import assert_close

LOSS_OF_CASE = {
    "authors.dpo": "dpo",
    "authors.cdpo": "dpo",
    "trl.hinge": "hinge",
    "trl.ipo": "ipo",
    "trl.robust": "robust",
}


def settings(loss: str, **others) -> DirectOptions:
    options = DirectOptions(loss=loss, **others)
    options.check()
    return options


@pytest.mark.parametrize(
    "name",
    ["authors.dpo", "authors.cdpo", "trl.hinge.beta0.5", "trl.ipo", "trl.robust.ls0.1.beta0.5"],
)
def test_losses_of_log_ratios_match_the_reference(reference, name):
    case = reference(f"dpo.{name}")
    loss = next(loss for prefix, loss in LOSS_OF_CASE.items() if name.startswith(prefix))
    smoothing = float(getattr(case.params, "label_smoothing", 0.0))
    options = settings(loss, beta=float(case.params.beta), label_smoothing=smoothing)
    inputs = case.inputs
    log_ratios = torch.cat([inputs.policy_chosen_logps, inputs.policy_rejected_logps])
    log_ratios = (
        log_ratios - torch.cat([inputs.ref_chosen_logps, inputs.ref_rejected_logps])
    ).requires_grad_()
    compared = log_ratios
    if options.kind.is_averaged:
        compared = compared / torch.cat([inputs.chosen_lengths, inputs.rejected_lengths])
    losses = pair_losses(*compared.chunk(2), options)
    losses.mean().backward()
    assert_close(losses, case.outputs.per_pair_loss)
    if hasattr(case.outputs, "grad_policy_logps_per_token"):
        assert_close(log_ratios.grad, case.outputs.grad_policy_logps_per_token[:, 0])


def test_ipo_sum_sums_over_tokens():
    assert settings("ipo").kind.is_averaged and not settings("ipo", ipo_sum=True).kind.is_averaged
    chosen, rejected = torch.tensor([3.0]), torch.tensor([-1.0])
    assert_close(ipo_loss(chosen, rejected, 0.5), torch.tensor([9.0]))  # (4 - 1)^2


def test_simpo_matches_the_reference_with_its_defaults(reference):
    case = reference("simpo.authors.sigmoid.b2.0.g0.25.ls0.0")
    losses = pair_losses(case.inputs.chosen_avg_logps, case.inputs.rejected_avg_logps, settings("simpo"))
    assert_close(losses, case.outputs.per_pair_loss)


def test_cpo_is_dpo_without_a_reference():
    chosen, rejected = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -4.0])
    expected = torch.log1p(torch.exp(-0.1 * (chosen - rejected)))
    assert_close(pair_losses(chosen, rejected, settings("cpo")), expected)


def test_orpo_matches_the_reference(reference):
    case = reference("orpo.trl.odds_ratio.b0.1")
    losses = orpo_loss(case.inputs.chosen_avg_logps, case.inputs.rejected_avg_logps, 0.1)
    assert_close(losses, -case.outputs.beta_logsigmoid_log_odds)


def test_orpo_is_accurate_for_probabilities_near_one_and_zero():
    chosen = torch.tensor([-1e-4, -60.0, 0.0], requires_grad=True)
    rejected = torch.tensor([-2e-4, -61.0, -0.5])
    losses = orpo_loss(chosen, rejected, 1.0)
    losses.sum().backward()
    wide, other = chosen.detach().double()[:2], rejected.double()[:2]
    odds = [x - torch.log(-torch.expm1(x)) for x in (wide, other)]
    assert_close(losses[:2], torch.log1p(torch.exp(odds[1] - odds[0])).float(), rtol=1e-4)
    assert losses.isfinite().all() and chosen.grad.isfinite().all()


@pytest.mark.parametrize("name", ["kto.halos.kl_random.w1.0_1.0", "kto.halos.kl_positive.w1.5_0.75"])
def test_kto_matches_the_reference(reference, name):
    case = reference(name)
    inputs, params = case.inputs, case.params
    point = max(0.0, float((inputs.policy_KL_logps - inputs.ref_KL_logps).mean()))
    weights = float(params.desirable_weight), float(params.undesirable_weight)
    log_ratios = inputs.policy_logps - inputs.ref_logps
    losses = kto_loss(log_ratios, inputs.label, point, float(params.beta), weights)
    assert_close(torch.tensor(point), case.outputs.KL)
    assert_close(
        torch.cat([losses[inputs.label], losses[~inputs.label]]), case.outputs.losses_chosen_then_rejected
    )
    assert_close(losses.mean(), case.outputs.loss)


def test_conservative_dpo_is_minimal_at_the_smoothed_win_rate():
    """The minimum is at beta d = log((1 - e) / e)."""
    best = torch.tensor([0.9 / 0.1]).log() / 0.5
    at, above, below = (dpo_loss(best + move, torch.zeros(1), 0.5, 0.1) for move in (0.0, 0.2, -0.2))
    assert at < above and at < below


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BETA = 0.3
# Of x and y, beta times the values of a chosen and a rejected response.
CLOSED_FORMS = {
    "sigmoid_norm": lambda x, y: -log_sigmoid(x - y),
    "exo_pair": lambda x, y: (
        sigmoid(x - y) * math.log(sigmoid(x - y) / 0.9) + sigmoid(y - x) * math.log(sigmoid(y - x) / 0.1)
    ),
    "nca_pair": lambda x, y: -log_sigmoid(x) - (log_sigmoid(-x) + log_sigmoid(-y)) / 2,
    "bco_pair": lambda x, y: -log_sigmoid(x) - log_sigmoid(-y),
    "sppo_hard": lambda x, y: ((x - 0.5) ** 2 + (y + 0.5) ** 2) / BETA**2,
    "apo_zero": lambda x, y: 1 - sigmoid(x) + sigmoid(y),
    "apo_down": lambda x, y: sigmoid(x) + 1 - sigmoid(x - y),
    "discopop": lambda x, y: (
        -sigmoid((y - x) / 0.05) * log_sigmoid(x - y) + sigmoid((x - y) / 0.05) * math.exp(y - x)
    ),
    "simpo_hinge": lambda x, y: max(0.0, 1 - x + y + 0.25 * BETA),
    "cpo_hinge": lambda x, y: max(0.0, 1 - x + y),
}
PAIRS = [(1.5, -2.0), (-0.75, 0.5), (3.0, 1.0), (-4.0, -4.25), (0.0, 0.0)]


@pytest.mark.parametrize("loss", CLOSED_FORMS)
def test_losses_match_their_closed_forms(loss):
    options = settings(loss, beta=BETA, **({"label_smoothing": 0.1} if loss == "exo_pair" else {}))
    chosen, rejected = torch.tensor(PAIRS).unbind(1)
    expected = [CLOSED_FORMS[loss](BETA * c, BETA * r) for c, r in PAIRS]
    assert_close(pair_losses(chosen, rejected, options), torch.tensor(expected))


def test_defaults_of_beta_and_label_smoothing_are_those_of_the_loss():
    losses = ("dpo", "simpo", "simpo_hinge", "sigmoid_norm", "exo_pair")
    assert [settings(loss).beta for loss in losses] == [0.1, 2.0, 2.0, 5.0, 0.1]
    assert [settings(loss).label_smoothing for loss in losses] == [0, 0, 0, 0, 0.001]


def test_exo_is_zero_at_the_label():
    best = torch.tensor([0.99 / 0.01]).log() / 0.5
    zero = torch.zeros(1)
    assert_close(exo_loss(best, zero, 0.5, 0.01), zero)
    assert exo_loss(best + 1, zero, 0.5, 0.01) > 0 and exo_loss(best - 1, zero, 0.5, 0.01) > 0


def test_discopop_is_finite_where_its_factors_are_not():
    d = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    losses = discopop_loss(d, torch.zeros(2), 1.0, 0.05)
    losses.sum().backward()
    assert_close(losses, torch.tensor([2000.0, 0.0]))
    assert_close(d.grad, torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("is_paired", [True, False])
def test_aot_is_the_loss_of_sorted_rewards(is_paired):
    """Mean and gradients are those of sorting with autograd."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 7, generator=generator).requires_grad_()
    chosen, rejected, old_chosen, old_rejected = values
    first, second = chosen - old_chosen, rejected - old_rejected
    if is_paired:
        d = (chosen - rejected).sort().values - (old_chosen - old_rejected).sort().values
        partners = aot_partners(first.detach(), second.detach(), (old_chosen - old_rejected).detach())
    else:
        d = first.sort().values - second.sort().values
        partners = aot_unpaired_partners(first.detach(), second.detach())
    sorted_losses = -0.9 * torch.log(torch.sigmoid(0.5 * d)) - 0.1 * torch.log(torch.sigmoid(-0.5 * d))
    (expected,) = torch.autograd.grad(sorted_losses.mean(), values, retain_graph=True)
    losses = aot_loss(first, second, partners, 0.5, 0.1)
    (result,) = torch.autograd.grad(losses.mean(), values)
    assert_close(losses.mean(), sorted_losses.mean())
    assert_close(result[:2], expected[:2])


def test_apo_zero_of_single_responses_is_kto_with_the_point_0():
    log_ratios, labels = torch.tensor([1.5, -2.0]), torch.tensor([True, False])
    losses = kto_loss(log_ratios, labels, 0.0, 0.3, (1.0, 1.0))
    assert_close(losses, torch.tensor([1 - sigmoid(0.45), sigmoid(-0.6)]))
