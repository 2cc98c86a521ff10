"""Scores of steps, against single forward passes of the model, and where their rewards go."""

import contextlib
import json
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from common.model.options import EnsembleOptions
from common.model.reward_ensemble import RewardModel
from common.text.prompts import Prompt, tokenize_prompt
from common.text.tokenizer import SegmentEncoder
from step2_reward.process.data import tokenize_steps
from step3_ppo.models import Scorer
from step3_ppo.process_rewards import ProcessModel, describe_steps, find_steps, step_probabilities
from step3_ppo.rollout import Rollout, concatenate
from step3_ppo.scoring import _scored_ids, closing_ids, score_responses
from tests.byte_encoder import byte_encoder
from tests.conftest import assert_close
from tests.step3_ppo.rollouts import rollout_of

QUESTION = [{"role": "user", "content": "2+3-1"}]
STEPS = ["2+3=5", "5-1=4", "so 4"]
# Responses, whether they ended, and the texts up to the ends of their steps.
RESPONSES = [
    ("2+3=5\n5-1=4\nso 4", True, ["2+3=5\n", "2+3=5\n5-1=4\n", "2+3=5\n5-1=4\nso 4"]),
    ("2+3=5\n\n5-1=4\n", True, ["2+3=5\n", "2+3=5\n\n5-1=4\n"]),
    ("4", True, ["4"]),
    ("", True, [""]),
    ("2+3=5\n5-", False, ["2+3=5\n", "2+3=5\n5-"]),
    ("2+3=5\n", False, ["2+3=5\n"]),
]


@pytest.fixture(scope="module")
def encoder() -> SegmentEncoder:
    """Bytes, and a template whose turns end in a token, a line end and EOS."""
    return byte_encoder(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    )


@pytest.fixture(scope="module")
def model(encoder: SegmentEncoder) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def scorer(model: LlamaForSequenceClassification, encoder: SegmentEncoder, **settings: object) -> Scorer:
    process = {"weight": 1.0, "aggregation": "product", **settings}
    member = RewardModel(encoder, partial(contextlib.nullcontext, model))
    return Scorer([], [], EnsembleOptions(), ProcessModel(member, "\n", **process))


def sampled(encoder: SegmentEncoder, prompt: list[dict] | str) -> tuple[list[Prompt], Rollout]:
    """The responses as a rollout; they end in the end-of-turn token for messages, in EOS for text."""
    record = {"prompt": prompt}
    row, _ = tokenize_prompt(record, encoder, 99, "error")
    name = "</s>" if isinstance(prompt, str) else "<|end|>"
    end = encoder.tokenizer.convert_tokens_to_ids(name)
    replies = [encoder._continue.encode(text).ids + [end] * ended for text, ended, _ in RESPONSES]
    width = max(map(len, replies))
    ids = torch.tensor([row.ids + reply + [0] * (width - len(reply)) for reply in replies])
    lengths = torch.tensor([*map(len, replies)])
    prompts = torch.full_like(lengths, len(row.ids))
    ended = torch.tensor([ended for _, ended, _ in RESPONSES])
    return [Prompt(row.ids, json.dumps(record))] * len(replies), rollout_of(ids, prompts, lengths, ended)


@pytest.mark.parametrize("prompt", [QUESTION, "2+3-1:"], ids=["messages", "text"])
def test_steps_are_scored_as_in_single_passes(encoder, model, prompt) -> None:
    """Each step by a pass over prompt and response up to its end; a last step without separator after the
    closing tokens, in truncated responses too. Micro-batches of two change nothing.
    """
    prompts, rollout = sampled(encoder, prompt)
    scored = score_responses(scorer(model, encoder, weight=0.5), encoder, prompts, rollout, range(6), 2)
    closing = closing_ids(encoder, prompt is QUESTION)
    for row, (text, ended, texts) in enumerate(RESPONSES):
        logprobs, columns = [], []
        for part in texts:
            ids = prompts[row].ids + encoder._continue.encode(part).ids
            is_last = part == text and not text.endswith("\n")
            with torch.no_grad():
                states = model.model(torch.tensor([ids + closing * is_last]))[0]
                logprobs.append(torch.sigmoid(model.score(states)[0, -1, 0]).log())
            length = len(ids) - len(prompts[row].ids)
            columns.append(length if is_last and ended else length - 1)
        assert scored.step_ends[row].nonzero()[:, 0].tolist() == columns
        assert_close(scored.step_scores[row, columns], 0.5 * torch.stack(logprobs))
        assert_close(scored.scores[row], 0.5 * sum(logprobs))
        assert_close(scored.score_parts[row], sum(logprobs)[None])
    assert not scored.step_scores[~scored.step_ends].any()


@pytest.mark.parametrize("how", ["min", "last"])
def test_other_aggregations_change_the_score_of_the_response_alone(encoder, model, how) -> None:
    prompts, rollout = sampled(encoder, QUESTION)
    product, other = (
        score_responses(scorer(model, encoder, aggregation=one), encoder, prompts, rollout, range(6), 3)
        for one in ("product", how)
    )
    assert torch.equal(product.step_scores, other.step_scores)
    for row in range(6):
        steps = other.step_scores[row][other.step_ends[row]]
        assert_close(other.scores[row], steps.min() if how == "min" else steps[-1])


@pytest.mark.parametrize("prompt", [QUESTION, "2+3-1:"], ids=["messages", "text"])
def test_states_that_are_read_are_those_of_step_2(encoder, prompt) -> None:
    record = {"prompt": prompt, "steps": STEPS, "labels": [1, 1, 1]}
    expected, _ = tokenize_steps(record, encoder, 99, "error", "\n")
    prompts, rollout = sampled(encoder, prompt)
    ids = _scored_ids(encoder, encoder, prompts[0], rollout, 0)
    lengths = len(prompts[0].ids), int(rollout.response_lengths[0])
    closing = len(closing_ids(encoder, prompt is QUESTION))
    steps = find_steps(ids, *lengths, closing, "\n", encoder.decode)
    assert (steps.ids, steps.positions) == (expected.ids, expected.ends)


def test_rows_beyond_the_context_lose_the_beginning_of_the_prompt(encoder, model, monkeypatch) -> None:
    prompts, rollout = sampled(encoder, QUESTION)
    longest = max(len(_scored_ids(encoder, encoder, prompts[row], rollout, row)) for row in range(6))
    monkeypatch.setattr(model.config, "max_position_embeddings", longest - 2)
    scored = score_responses(scorer(model, encoder), encoder, prompts, rollout, range(6), 2)
    ids = _scored_ids(encoder, encoder, prompts[0], rollout, 0)[2:]
    with torch.no_grad():
        scores = model.score(model.model(torch.tensor([ids]))[0])[0, :, 0]
    ends = [len(ids) - len(closing_ids(encoder, True)) - before for before in (11, 5)]  # characters
    assert_close(scored.step_scores[0][scored.step_ends[0]], scores[[*ends, -1]].sigmoid().log())


def test_metrics_and_probabilities_by_hand(encoder, model) -> None:
    """Probabilities 1/2 and 1/4 of one response, 1 of another; weight 2."""
    process = scorer(model, encoder, weight=2.0).process
    scores = 2 * torch.tensor([[0.5, 1.0, 0.25], [1.0, 1.0, 1.0]]).log()
    ends = torch.tensor([[True, False, True], [False, True, False]])
    expected = {"process/mean": 1.75 / 3, "process/min": 1.25 / 2, "process/steps": 1.5}
    assert describe_steps(process, scores, ends) == pytest.approx(expected)
    assert step_probabilities(process, scores[0], ends[0]) == [0.5, 0.25]


def test_steps_stay_with_their_responses(encoder) -> None:
    """In rollouts that are joined, as after redrawing groups: also of another width."""
    _, rollout = sampled(encoder, QUESTION)
    steps = {"step_scores": torch.tensor([[-1.0, 0.0]]), "step_ends": torch.tensor([[True, False]])}
    ids, one = torch.ones(1, 3, dtype=torch.long), torch.tensor([1])
    short = rollout_of(ids, one, torch.tensor([2]), torch.tensor([True]), **steps)
    joined = concatenate(rollout, short).pick([6, 0])
    assert joined.step_scores[0, 0] == -1 and joined.step_ends[0].sum() == 1
    assert joined.step_ends.shape == rollout.step_ends[:2].shape and not joined.step_ends[1].any()
