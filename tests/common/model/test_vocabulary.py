"""Models with spare embedding rows and several end tokens, in every kind of sampling."""

import json

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from common.generation.generate import PlainEngine, generate, sample_answers
from common.generation.options import GenerationOptions
from common.model.vocabulary import fit_to_tokenizer, spare_ids
from common.text.tokenizer import SegmentEncoder
from launch.chat.options import ChatOptions
from launch.chat.session import Chat, Speaker
from step1_sft import evaluate
from step1_sft.data import Demonstration
from step1_sft.options import SampleAnswerOptions
from tests.byte_encoder import byte_encoder

SPARE = 8  # embedding rows without a token


@pytest.fixture(scope="module")
def encoder() -> SegmentEncoder:
    """A byte tokenizer with an end token that is not special, so decoding would show it."""
    return byte_encoder("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}")


@pytest.fixture
def model(encoder: SegmentEncoder) -> PhiForCausalLM:
    """Spare rows have by far the highest probability, then <|end|>; EOS is never sampled."""
    tokenizer = encoder.tokenizer
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer) + SPARE, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.bias[-SPARE:] = 30.0
        model.lm_head.bias[tokenizer.convert_tokens_to_ids("<|end|>")] = 4.0
        model.lm_head.bias[tokenizer.eos_token_id] = -30.0
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|end|>"), 10**6]
    return fit_to_tokenizer(model, tokenizer)


def test_end_ids_of_tokenizer_and_model_are_saved(encoder, model, tmp_path):
    end = len(encoder.tokenizer) - 1
    assert model.num_tokens == len(encoder.tokenizer)
    assert model.end_ids == [encoder.eos_token_id, end]
    assert spare_ids(model) == list(range(end + 1, end + 1 + SPARE))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [encoder.eos_token_id, end]


def test_a_vocabulary_that_grows_has_a_multiple_of_64_rows(encoder, tmp_path):
    """The old rows stay, the tokenizer keeps its size, and what is saved does not grow again."""
    tokens = len(encoder.tokenizer)
    config = PhiConfig(vocab_size=tokens - 1, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    model = PhiForCausalLM(config)
    before = model.lm_head.weight.detach().clone()
    fit_to_tokenizer(model, encoder.tokenizer)
    rows = model.config.vocab_size
    assert tokens <= rows < tokens + 64 and rows % 64 == 0 and tokens % 64
    assert (model.num_tokens, spare_ids(model)) == (tokens, [*range(tokens, rows)])
    assert model.lm_head.weight[: tokens - 1].equal(before)
    model.save_pretrained(tmp_path)
    saved = PhiForCausalLM.from_pretrained(tmp_path)
    for one in (saved, fit_to_tokenizer(saved, encoder.tokenizer)):
        shapes = {
            one.lm_head.weight.shape[0],
            one.lm_head.bias.shape[0],
            one.model.embed_tokens.weight.shape[0],
        }
        assert {*shapes, one.config.vocab_size} == {rows}


def test_a_vocabulary_with_a_row_for_each_token_stays(encoder):
    """As in a folder from before rows were padded, from which a run is resumed."""
    config = PhiConfig(vocab_size=len(encoder.tokenizer), hidden_size=16, num_attention_heads=2)
    model = fit_to_tokenizer(PhiForCausalLM(config), encoder.tokenizer)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(encoder.tokenizer)


def test_rollouts_end_at_any_end_token(encoder, model):
    options = GenerationOptions(max_response_length=40, generation_batch_size=3)
    options.seed = 0
    prompts = {number: encoder.tokenizer("Say it").input_ids for number in range(6)}
    responses = generate(PlainEngine(model), encoder, prompts, list(range(6)), options, step=1)
    assert responses.ended.all() and responses.lengths.float().mean() < 30
    assert (responses.ids < model.num_tokens).all()
    last = responses.ids.gather(1, responses.lengths[:, None] - 1)
    assert (last == model.end_ids[1]).all()
    answers = sample_answers(PlainEngine(model), encoder, prompts, options, step=1)
    assert all(answer.ended and "<|end|>" not in answer.text for answer in answers.values())
    rows = zip(responses.ids, responses.lengths, strict=True)
    texts = [encoder.tokenizer.decode(ids[: n - 1]) for ids, n in rows]
    assert [answers[number].text for number in range(6)] == texts


def test_greedy_answers_of_step_1_end_at_any_end_token(encoder, model):
    row = Demonstration(encoder.tokenizer("Say it").input_ids, [False] * 5 + [True])
    options = SampleAnswerOptions(sample_length=20)
    (sample,) = evaluate.greedy_answers(PlainEngine(model), [row], encoder, options)
    assert sample.answer == "", "the most likely token is the end token"
    with torch.no_grad():
        model.lm_head.bias[encoder.tokenizer("a").input_ids] = 20.0
    (sample,) = evaluate.greedy_answers(PlainEngine(model), [row], encoder, options)
    assert sample.answer == "a" * 20, "spare rows are not sampled"


def test_a_chat_ends_at_any_end_token(encoder, model, capsys):
    options = ChatOptions(max_response_length=40, seed=1)
    chat = Chat([Speaker("new", model, encoder, 24)], [], options)
    chat.send("Hello")
    (answer,) = chat._answers.values()
    assert answer.text and not any("cut off" in flaw for flaw in answer.flaws)
    assert "<|end|>" not in answer.text and "<|end|>" not in capsys.readouterr().out
