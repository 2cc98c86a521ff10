"""How scores of several reward models become one, and how models that wait come to the device."""

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
def test_combinations_are_those_of_numpy(weights):
    scores = SCORES.double().numpy()
    mean = np.average(scores, axis=0, weights=weights or None)
    std = np.sqrt(np.average((scores - mean) ** 2, axis=0, weights=weights or None))
    assert_close(combine_scores(SCORES, "mean", weights=weights), torch.tensor(mean).float())
    assert_close(combine_scores(SCORES, "mean_std", 0.7, weights), torch.tensor(mean - 0.7 * std).float())
    assert combine_scores(SCORES, "min").tolist() == scores.min(0).tolist()


def test_worked_by_hand():
    """Members 1, 3, 5 have mean 3 and variance 8/3; the same score thrice has no deviation."""
    assert combine_scores(SCORES)[0] == 3.0
    assert_close(combine_scores(SCORES, "mean_std", 1.5)[[0, 2]].tolist(), [3 - 1.5 * (8 / 3) ** 0.5, 0.5])


@pytest.mark.parametrize("how", ["mean", "min", "mean_std"])
def test_the_only_member_has_its_say_bit_by_bit(how):
    one = torch.randn(1, 100)
    assert torch.equal(combine_scores(one, how, 2.0, [] if how == "min" else [0.3]), one[0])


def test_only_the_model_that_runs_is_on_the_device(monkeypatch):
    """Weights, tied ones too, and buffers go there, and those that waited are back afterwards, uncopied."""
    monkeypatch.setattr(ensemble, "device", lambda: torch.float64)  # what `to` turns them into, like a device
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data_ptr() for tensor in tensors]
    with pytest.raises(KeyError), on_device(model) as there:
        assert {tensor.dtype for tensor in [*there.parameters(), *there.buffers()]} == {torch.float64}
        raise KeyError
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert model[0].weight.dtype == torch.float32
