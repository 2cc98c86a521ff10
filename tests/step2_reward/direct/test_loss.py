"""Every loss and its gradients, against the authors' code, TRL or a closed form."""

import pytest
import torch

from step2_reward.direct.loss import dpo_loss, ipo_loss, kto_loss, orpo_loss
from step2_reward.direct.objective import pair_losses
from step2_reward.direct.options import DirectOptions
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
