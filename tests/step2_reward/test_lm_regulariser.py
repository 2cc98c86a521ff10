"""The language-model loss of step 2 matches that of the SFT model."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from step2_reward.data import Layout, Preference, collate
from step2_reward.lm_regulariser import best_response_logprobs
from step2_reward.loss import language_loss
from step2_reward.shared_prompt import pair_scores_and_states
from tests.conftest import assert_close
from tests.end_to_end.test_bad_input import check_refusal
from tests.stages import reward

ROWS = [
    Preference([1, 7, 8], [20, 21, 2, 30, 2, 31, 32, 33, 2], [3, 2, 4], [0.0, 1.0, 1.0]),
    Preference([1, 9], [22, 2, 23, 24, 2], [2, 3], [0.0, 1.0]),
]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_loss_and_gradients_match_the_language_model(share_prompts: bool, ended: bool) -> None:
    """Expected: transformers' own loss, one response at a time. The EOS of a cut response is no label."""
    rows = [ROWS[0]._replace(best_ended=ended), ROWS[1]]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    plain, scorer = LlamaForCausalLM(config).double(), LlamaForSequenceClassification(config).double()
    scorer.model = plain.model
    expected = 0.0
    for row in rows:
        ids = torch.tensor([row.chosen_ids])
        labels = torch.full_like(ids, -100)
        labels[:, len(row.prompt_ids) :] = ids[:, len(row.prompt_ids) :]
        if not row.best_ended:
            labels[:, -1] = -100
        expected = expected + plain(input_ids=ids, labels=labels).loss * (labels >= 0).sum()
    count = sum(row.language_length for row in rows)
    assert count == 5 - (not ended)
    expected = expected / count
    expected.backward()
    gradients = [p.grad.clone() for p in plain.model.parameters()]
    plain.zero_grad()

    batch = collate(rows, Layout(0, share_prompts))
    _, _, states = pair_scores_and_states(scorer, batch)
    loss = language_loss(best_response_logprobs(plain.lm_head, states, batch), num_tokens=count)
    loss.backward()
    assert_close(loss, expected, check_dtype=False)
    for p, gradient in zip(plain.model.parameters(), gradients, strict=True):
        assert_close(p.grad, gradient)


def test_a_reward_model_as_start_is_refused(world: Path, run: Path, tmp_path: Path) -> None:
    words = [*reward(world, run / "reward/final", tmp_path / "out"), "--lm_loss_coef", "0.1"]
    check_refusal(
        "step2_reward.main", words, ["--lm_loss_coef 0.1", "is a reward model"], tmp_path, tmp_path / "out"
    )
