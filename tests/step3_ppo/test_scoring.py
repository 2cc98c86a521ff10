"""Values and scored token ids, compared with single rows; memory of scoring."""

import contextlib
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.model import head
from common.text.prompts import Prompt, tokenize_prompt
from common.text.tokenizer import SegmentEncoder
from step2_reward.data import tokenize_response
from step3_ppo import scoring
from step3_ppo.options import PPOOptions
from step3_ppo.scoring import Scores, _scored_ids, _value_pass, close, score_rollout
from tests.byte_encoder import byte_encoder
from tests.step3_ppo.rollouts import rollout_of

PROMPTS = [3, 1, 4]
RESPONSES = [2, 5, 3]
ENDED = [False, True, False]


@pytest.mark.parametrize("bootstrap", [True, False])
def test_values_before_each_token_and_after_truncated_responses(bootstrap):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    critic = LlamaForSequenceClassification(config).eval()
    ids = torch.randint(1, 32, (3, 7))
    rollout = rollout_of(ids, torch.tensor(PROMPTS), torch.tensor(RESPONSES), torch.tensor(ENDED))
    order = [2, 0, 1]
    options = PPOOptions(bootstrap_truncated=bootstrap)
    with torch.no_grad():
        values, last = _value_pass(critic, rollout, order, options)
        states = [critic.model(ids[[row], : PROMPTS[row] + RESPONSES[row]])[0][0] for row in order]
        single = [critic.score(state)[:, 0] for state in states]  # (T,) of each row
    before = [one[PROMPTS[row] - 1 : -1] for row, one in zip(order, single, strict=True)]
    torch.testing.assert_close(values, torch.cat(before), rtol=0, atol=1e-6)
    after = [one[-1] * (bootstrap and not ENDED[row]) for row, one in zip(order, single, strict=True)]
    torch.testing.assert_close(last, torch.stack(after), rtol=0, atol=1e-6)


def test_logits_of_two_tokens_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, logits, sizes = torch.zeros(3, 5), [], []

    def compute(chunk: torch.Tensor, targets: head.Targets) -> torch.Tensor:
        assert not any(earlier() is not None for earlier in logits)
        logits.append(weakref.ref(chunk))
        sizes.append(len(chunk))
        return logprobs_and_entropy(chunk, targets)

    logprobs_and_entropy = head.logprobs_and_entropy
    monkeypatch.setattr(head, "logprobs_and_entropy", compute)
    monkeypatch.setattr(head, "CHUNK", 2 * 32)
    scores = Scores(rows[:, 0], rows[:, :0], rows, rows.bool())
    monkeypatch.setattr(scoring, "score_responses", lambda *_: scores)
    ids = torch.ones(3, 7, dtype=torch.long)
    rollout = rollout_of(ids, torch.tensor(PROMPTS), torch.tensor(RESPONSES), torch.tensor(ENDED))
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    actor = torch.nn.Module()
    actor.module = LlamaForCausalLM(config).bfloat16()
    actor.module.num_tokens = 32
    actor.forward = actor.module.forward
    models = SimpleNamespace(
        actor=actor, critic=None, scorer=None, encoder=None,
        reference_model=lambda: contextlib.nullcontext(actor),
    )  # fmt: skip
    scored = score_rollout(models, [], rollout, PPOOptions(generation_batch_size=1))
    assert sizes == 2 * [2, 2, 2, 1, 2, 1] and (scored.ref_logprobs < 0).sum() == sum(RESPONSES)
    assert torch.equal(scored.logprobs, scored.ref_logprobs)
    assert not scored.behaviour_logprobs.any(), "those of the draw stay"


@pytest.fixture(scope="module")
def encoder() -> SegmentEncoder:
    """Byte tokenizer with a template like Phi-3's: turns end in <|end|>, and EOS follows the last turn."""
    return byte_encoder(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    )


@pytest.mark.parametrize("is_other_engine", [False, True])
def test_log_probabilities_of_another_engine_are_computed_again(monkeypatch, is_other_engine):
    """In fp32 too: the update's ratio is to the trainer's own numbers."""
    zeros = torch.zeros(3, 5)
    scores = Scores(zeros[:, 0], zeros[:, :0], zeros, zeros.bool())
    monkeypatch.setattr(scoring, "score_responses", lambda *_: scores)
    monkeypatch.setattr(
        scoring, "policy_pass", lambda _, rows, __: SimpleNamespace(logprobs=-torch.ones(len(rows.labels)))
    )
    rollout = rollout_of(
        torch.ones(3, 7, dtype=torch.long), torch.tensor(PROMPTS), torch.tensor(RESPONSES),
        torch.tensor(ENDED), logprobs=torch.full((3, 5), -2.0),
    )  # fmt: skip
    actor = torch.nn.Module()
    actor.module = torch.nn.Linear(1, 1)
    models = SimpleNamespace(
        actor=actor, sampler=None if is_other_engine else actor, critic=None, scorer=None, encoder=None,
        reference_model=lambda: contextlib.nullcontext(actor),
    )  # fmt: skip
    scored = score_rollout(models, [], rollout, PPOOptions())
    assert scored.logprobs[0, 0] == (-1 if is_other_engine else -2)


@pytest.mark.parametrize("ending", ["turn", "eos", "both", "none"])
@pytest.mark.parametrize("is_conversation", [True, False])
def test_scored_ids_equal_those_of_step_2(encoder, ending, is_conversation):
    """For every end of the response, and for truncated ones, the ids are those of step 2 for the dialogue."""
    question = [{"role": "user", "content": "What is this?"}] if is_conversation else "What is this?"
    record = {"prompt": question, "completion": "A tree"}
    expected, _ = tokenize_response(record, encoder, max_length=99, overlong="error")
    row, _ = tokenize_prompt(record, encoder, 99, "error")
    end = encoder.tokenizer.convert_tokens_to_ids("<|end|>")
    reply = encoder._continue.encode("A tree").ids
    newline = encoder._continue.encode("\n").ids
    eos = encoder.eos_token_id
    endings = {"turn": [end], "eos": [eos], "both": [end, *newline, eos], "none": []}
    if not is_conversation:
        endings["both"] = [eos]
    response = torch.tensor([row.ids + reply + endings[ending]])
    length = torch.tensor([response.shape[1] - len(row.ids)])
    rollout = rollout_of(response, torch.tensor([len(row.ids)]), length, torch.tensor([ending != "none"]))
    assert _scored_ids(encoder, encoder, Prompt(row.ids, json.dumps(record)), rollout, 0) == expected.ids


def test_closing_is_not_repeated():
    assert close([7, 1], True, [1, 2, 3]) == [7, 1, 2, 3]
    assert close([7, 1, 2, 3], True, [1, 2, 3]) == [7, 1, 2, 3]
    assert close([7, 3], True, [1, 2, 3]) == [7, 1, 2, 3]
    assert close([7, 9], True, [1, 2, 3]) == [7, 1, 2, 3], "another end token"
    assert close([7, 9], False, [1, 2, 3]) == [7, 9, 1, 2, 3], "cut off"
    assert close([3], True, [3]) == [3]
