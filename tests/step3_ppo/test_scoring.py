"""What the critic says of responses, against the plain model, one row at a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout
from step3_ppo.scoring import _value_pass

PROMPTS = [3, 1, 4]
RESPONSES = [2, 5, 3]
ENDED = [False, True, False]


@pytest.mark.parametrize("bootstrap", [True, False])
def test_values_before_each_token_and_after_a_response_that_was_cut_off(bootstrap):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    critic = LlamaForSequenceClassification(config).eval()
    ids = torch.randint(1, 32, (3, 7))
    rows = torch.zeros(3, 5)
    rollout = Rollout(
        ids, torch.tensor(PROMPTS), torch.tensor(RESPONSES), torch.tensor(ENDED), logprobs=rows,
        ref_logprobs=rows, values=rows, last_values=rows[:, 0], scores=rows[:, 0], score_parts=rows[:, :0],
        support=torch.zeros(3, 5, 0, dtype=torch.uint8),
        computed=torch.zeros(3),
    )  # fmt: skip
    order = [2, 0, 1]
    options = PPOOptions(bootstrap_truncated=bootstrap)
    with torch.no_grad():
        values, last = _value_pass(critic, rollout, order, options)
        states = [critic.model(ids[[row], : PROMPTS[row] + RESPONSES[row]])[0][0] for row in order]
        alone = [critic.score(state)[:, 0] for state in states]  # (T,) of each row
    before = [a[PROMPTS[row] - 1 : -1] for row, a in zip(order, alone, strict=True)]
    torch.testing.assert_close(values, torch.cat(before), rtol=0, atol=1e-6)
    after = [a[-1] * (bootstrap and not ENDED[row]) for row, a in zip(order, alone, strict=True)]
    torch.testing.assert_close(last, torch.stack(after), rtol=0, atol=1e-6)
