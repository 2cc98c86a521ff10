"""Reward-model ensembles: aggregation of scores, and moving offloaded models to the device."""

import numpy as np
import pytest
import torch
from torch import nn

from common.model import reward_ensemble as ensemble
from common.model.reward_ensemble import combine_scores, on_device, score_rows
from common.model.shared_prompt import can_share_prompts
from tests.common.model.test_shared_prompt import TWO, make
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "alibi"])
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_scores_of_texts_that_share_a_prompt(name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch):
    """As plain transformers scores each text; some are longer than the model's context length."""
    monkeypatch.setattr(ensemble, "max_positions", lambda _: 14)
    model, random = make(name, torch.float), np.random.default_rng(0)
    texts = []
    for length, responses in ((6, (3, 5)), (2, (9, 1)), (9, (4, 5)), (12, (1, 7))):
        prompt = random.integers(2, 50, length).tolist()
        texts += [prompt + random.integers(2, 50, size).tolist() for size in responses]
    texts += [texts[0], texts[0], [7], [7, 8]]
    shares, rows = can_share_prompts(model, TWO), []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    scores = score_rows(model, texts, batch_size, sharing=TWO)
    hook.remove()
    assert shares == (name != "alibi") and sum(rows) == len(texts) / (1 + shares)
    single = [model(input_ids=torch.tensor([text[-14:]])).logits[0, -1] for text in texts]
    assert_close(scores, torch.stack(single).detach(), atol=1e-5)


def test_rows_of_several_texts_fill_a_batch(monkeypatch: pytest.MonkeyPatch):
    """As many texts as without sharing, and those with a like number of tokens together."""
    shapes = []

    def zeros(_: object, input_ids: torch.Tensor, positions: torch.Tensor, **layout: object) -> torch.Tensor:
        shapes.append((*input_ids.shape, len(layout)))
        return torch.zeros(int(positions.sum()))

    monkeypatch.setattr(ensemble, "token_scores", zeros)
    model = make("llama")
    texts = [[5] * (2 + n) + [n, n] for n in range(4) for _ in range(2)]
    score_rows(model, texts, 4, sharing=TWO)
    score_rows(model, texts, 4)
    assert shapes == [(2, 6, 2), (2, 8, 2), (4, 5, 0), (4, 7, 0)]
