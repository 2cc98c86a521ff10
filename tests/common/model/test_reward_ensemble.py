"""Reward-model ensembles: aggregation of scores, and moving offloaded models to the device."""

import numpy as np
import pytest
import torch
from torch import nn

from common.model import reward_ensemble as ensemble
from common.model.reward_ensemble import combine_scores, on_device
from tests.conftest import assert_close

SCORES = torch.tensor([[1.0, -2.0, 0.5], [3.0, 4.0, 0.5], [5.0, -8.0, 0.5]])  # 3 members, 3 responses
WEIGHTS = [1.0, 2.0, 5.0]


@pytest.mark.parametrize("weights", [[], WEIGHTS])
def test_aggregated_scores_match_numpy(weights):
    scores = SCORES.double().numpy()
    mean = np.average(scores, axis=0, weights=weights or None)
    std = np.sqrt(np.average((scores - mean) ** 2, axis=0, weights=weights or None))
    assert_close(combine_scores(SCORES, "mean", weights=weights), torch.tensor(mean).float())
    assert_close(combine_scores(SCORES, "mean_std", 0.7, weights), torch.tensor(mean - 0.7 * std).float())
    assert combine_scores(SCORES, "min").tolist() == scores.min(0).tolist()


def test_scores_computed_by_hand():
    """Members 1, 3, 5 have mean 3 and variance 8/3; three equal scores have deviation 0."""
    assert combine_scores(SCORES)[0] == 3.0
    assert_close(combine_scores(SCORES, "mean_std", 1.5)[[0, 2]].tolist(), [3 - 1.5 * (8 / 3) ** 0.5, 0.5])


@pytest.mark.parametrize("how", ["mean", "min", "mean_std"])
def test_a_single_member_keeps_its_exact_score(how):
    one = torch.randn(1, 100)
    assert torch.equal(combine_scores(one, how, 2.0, [] if how == "min" else [0.3]), one[0])


def test_an_offloaded_model_is_on_the_device_only_in_its_context(monkeypatch):
    """Weights, tied ones too, and buffers move; afterwards the original host tensors are back, not copies."""
    monkeypatch.setattr(ensemble, "device", lambda: torch.float64)  # stands for a device in `to`
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data_ptr() for tensor in tensors]
    with pytest.raises(KeyError), on_device(model) as moved:
        assert {tensor.dtype for tensor in [*moved.parameters(), *moved.buffers()]} == {torch.float64}
        raise KeyError
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert model[0].weight.dtype == torch.float32
