"""Sampling: the right distribution, the right log-probabilities, and rows that know nothing of each other."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    PretrainedConfig,
    Qwen3NextConfig,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.generation import decoding as sampling
from common.generation.decoding import Responses, sample_responses, uniforms_for
from step3_ppo.rollout import Rollout, policy_pass, take_rows
from tests.conftest import assert_close

EOS, PAD, VOCABULARY = 0, 39, 40
PROBABILITIES = torch.tensor([0.05, 0.5, 0.0, 0.3, 0.15])
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [17, 18]]
TEMPERATURE = 0.7


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature=1.0, top_p=1.0, top_k=0):
    """Tokens (B,) and their log-probabilities, for logits (V,) or (B, V) and one uniform number per row."""
    found = sampling.draw(logits.expand(len(uniforms), -1), uniforms, temperature, top_p, top_k)
    return found[:2]


def test_frequencies_follow_the_distribution():
    count = 4000
    tokens, _ = draw(PROBABILITIES.log(), uniforms_for(0, 1, range(count), 1)[:, 0])
    found = tokens.bincount(minlength=5)
    assert found[2] == 0
    expected = count * PROBABILITIES
    chi_square = ((found - expected) ** 2 / expected)[PROBABILITIES > 0].sum()
    assert chi_square < 16.3, "three degrees of freedom, p = 0.001"


def test_evenly_spaced_numbers_give_exact_shares():
    count = 10_000
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    tokens, logprobs = draw(logits, (torch.arange(count) + 0.5) / count, temperature=2.0)
    exact = (logits.double() / 2.0).softmax(-1)
    assert (tokens.bincount(minlength=4) - count * exact).abs().max() <= 1
    assert_close(logprobs, exact.log().float()[tokens])


def test_ends_of_the_range():
    tokens, _ = draw(torch.tensor([[0.0, 0.0, float("-inf")]]), torch.tensor([0.0, 1 - 2**-24]))
    assert tokens.tolist() == [0, 1]
    tokens, _ = draw(torch.tensor([[float("-inf"), 0.0, 0.0]]), torch.tensor([0.0]))
    assert tokens.tolist() == [1], "a token of probability 0 is never drawn"


@pytest.mark.parametrize("cut", [{"top_p": 0.6}, {"top_k": 2}, {"top_p": 0.6, "top_k": 4}])
def test_logprobs_are_those_with_which_tokens_are_drawn(cut):
    count = 8000
    tokens, logprobs = draw(PROBABILITIES.log(), (torch.arange(count) + 0.5) / count, **cut)
    assert tokens.bincount(minlength=5).tolist() == [0, 5000, 0, 3000, 0]  # 0.5 : 0.3
    assert_close(logprobs, (PROBABILITIES / 0.8).log()[tokens])


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(3)
    logits, uniforms = torch.randn(20, 11, generator=generator), torch.rand(20, generator=generator)
    together, _ = draw(logits, uniforms, top_p=0.8)
    alone = [draw(logits[i : i + 1], uniforms[i : i + 1], top_p=0.8)[0].item() for i in range(20)]
    assert together.tolist() == alone
    assert len(set(alone)) > 3


def test_uniforms_are_a_function_of_seed_step_and_row():
    base = uniforms_for(0, 1, [4, 7], 5)
    assert base.shape == (2, 5) and base.dtype == torch.float32
    assert torch.equal(base, uniforms_for(0, 1, [4, 7], 5))
    assert torch.equal(base[1], uniforms_for(0, 1, [7], 5)[0])
    assert torch.equal(base[:, :3], uniforms_for(0, 1, [4, 7], 3)), "a longer limit only adds numbers"
    others = [base[1], uniforms_for(1, 1, [4], 5)[0], uniforms_for(0, 2, [4], 5)[0]]
    assert all((base[0] != other).all() for other in others)
    assert (base >= 0).all() and (base < 1).all()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.num_tokens = VOCABULARY
    return model


def sample(
    model, rows: list[int], length: int = 10, uniforms=None, top_p=1.0, top_k=0, ends=EOS, num_tokens=None
) -> Responses:
    uniforms = uniforms_for(0, 1, rows, length) if uniforms is None else uniforms
    prompts = [PROMPTS[row] for row in rows]
    return sample_responses(model, prompts, uniforms, TEMPERATURE, top_p, ends, PAD, False, top_k, num_tokens)


def as_rollout(responses: Responses) -> Rollout:
    """Responses to all prompts, padded on the right."""
    lengths = responses.lengths.tolist()
    rows = [p + ids[:n].tolist() for p, ids, n in zip(PROMPTS, responses.ids, lengths, strict=True)]
    width = max(map(len, rows))
    empty = torch.zeros_like(responses.logprobs)
    return Rollout(
        input_ids=torch.tensor([row + [PAD] * (width - len(row)) for row in rows]),
        prompt_lengths=torch.tensor([len(p) for p in PROMPTS]),
        response_lengths=responses.lengths,
        ended=responses.ended,
        logprobs=responses.logprobs,
        ref_logprobs=empty,
        values=empty,
        last_values=empty[:, 0],
        scores=empty[:, 0],
        score_parts=empty[:, :0],
        support=responses.support,
        computed=responses.computed,
    )


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.7, 0), (1.0, 3), (0.7, 9)])
def test_logprobs_are_those_of_the_trainer(model, top_p, top_k):
    """Generation pads on the left and caches; the update pads on the right and does not. What top_p and top_k
    leave is what transformers leaves, but for a token that it takes in when shares reach top_p exactly.
    """
    responses = sample(model, [0, 1, 2, 3], top_p=top_p, top_k=top_k)
    lengths = responses.lengths.tolist()
    rollout = as_rollout(responses)
    rows = [rollout.prompt(row) + rollout.response(row) for row in range(4)]
    with torch.no_grad():
        trained, *_ = policy_pass(model, take_rows(rollout, [0, 1, 2, 3]), TEMPERATURE)
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
    drawn = responses.logprobs[rollout.response_mask]
    torch.testing.assert_close(trained, drawn, rtol=0, atol=1e-5)
    for row, (ids, logits, prompt) in enumerate(zip(rows, alone, PROMPTS, strict=True)):
        exact = logits.double() / TEMPERATURE
        if top_k:
            exact = TopKLogitsWarper(top_k)(None, exact)
        exact = TopPLogitsWarper(top_p)(None, exact).log_softmax(-1)
        expected = [exact[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        found = responses.logprobs[row, : lengths[row]]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_response_does_not_depend_on_the_batch(model):
    together = sample(model, [0, 1, 2, 3])
    for row in range(4):
        alone = sample(model, [row])
        assert torch.equal(alone.ids[0], together.ids[row])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], rtol=0, atol=1e-5)
    reversed_order = sample(model, [3, 2, 1, 0])
    assert torch.equal(reversed_order.ids.flip(0), together.ids)


def test_eos_ends_a_response_and_counts(model):
    """EOS is the first id of the vocabulary, so the number 0 draws it and a number near 1 never does."""
    uniforms = torch.full((3, 6), 0.999)
    uniforms[1, 2] = 0.0
    uniforms[2, [0, 4]] = 0.0
    found = sample(model, [0, 1, 2], uniforms=uniforms)
    assert found.lengths.tolist() == [6, 3, 1]
    assert found.ended.tolist() == [False, True, True]
    assert (found.ids[0] != EOS).all()
    assert found.ids[1, 2] == EOS and (found.ids[1, 3:] == PAD).all()
    assert found.ids[2].tolist() == [EOS] + [PAD] * 5
    mask = torch.arange(6) < found.lengths[:, None]
    assert (found.logprobs[mask] < 0).all() and not found.logprobs[~mask].any()


def test_each_of_several_end_tokens_ends_a_response(model):
    """The first id is drawn by the number 0, the last one by a number near 1."""
    uniforms = torch.full((3, 6), 0.5)
    uniforms[1, 2], uniforms[2, 4] = 0.0, 1 - 2**-24
    found = sample(model, [0, 1, 2], uniforms=uniforms, ends=[EOS, 37], num_tokens=38)
    lengths, ended = found.lengths.tolist(), found.ended.tolist()
    assert (lengths[1:], ended[1:]) == ([3, 5], [True, True])
    assert (found.ids[1, 2], found.ids[2, 4]) == (EOS, 37)
    assert sample(model, [2], uniforms=uniforms[2:], num_tokens=38).lengths.tolist() == [6]
    assert found.computed.tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, lengths, strict=False)]


def test_rows_beyond_the_tokenizer_are_never_drawn(model):
    """They have the largest logits of all; what is measured is the distribution over the others."""
    count, weight = 30, model.lm_head.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[count:] = 4 * weight[1:2]  # in the direction of a token that is often drawn
        weight[count + 1 :] *= -1
    try:
        model.num_tokens = count
        for cut in ({}, {"top_p": 0.7}, {"top_k": 35}):
            found = sample(model, [0, 1, 2, 3], num_tokens=count, **cut)
            rollout = as_rollout(found)
            assert (found.ids[rollout.response_mask] < count).all()
            with torch.no_grad():
                trained, logits, _ = policy_pass(model, take_rows(rollout, [0, 1, 2, 3]), TEMPERATURE)
            assert logits.shape[1] == count
            drawn = found.logprobs[rollout.response_mask]
            torch.testing.assert_close(trained, drawn, rtol=1e-5, atol=1e-5)
        unlimited = sample(model, [0, 1, 2, 3])
        assert (unlimited.ids[as_rollout(unlimited).response_mask] >= count).any()
    finally:
        model.num_tokens = VOCABULARY
        weight.data.copy_(original)


FAMILIES: dict[str, PretrainedConfig] = {
    "phi3": Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=PAD,
        initializer_range=0.4,
    ),
    "mamba": MambaConfig(
        hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4, initializer_range=0.4
    ),
    "qwen3_next": Qwen3NextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, initializer_range=0.2,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_other_families_know_nothing_of_each_other(name):
    """Their caches hold recurrent states, and they are asked for their inputs in other ways. Two rows end
    early, so that the states of the others must stay theirs.
    """
    config = FAMILIES[name]
    config.vocab_size = VOCABULARY
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.num_tokens = VOCABULARY
    uniforms = uniforms_for(0, 1, range(4), 8).clamp(min=0.05)
    uniforms[1, 1] = uniforms[2, 2] = 0.0
    together = sample(model, [0, 1, 2, 3], uniforms=uniforms)
    assert together.lengths.tolist()[1:3] == [2, 3]
    for row in range(4):
        alone = sample(model, [row], uniforms=uniforms[row : row + 1])
        assert torch.equal(alone.ids[0], together.ids[row])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], rtol=0, atol=1e-5)
    rollout = as_rollout(together)
    with torch.no_grad():
        trained, *_ = policy_pass(model.train(), take_rows(rollout, [0, 1, 2, 3]), TEMPERATURE)
    drawn = together.logprobs[rollout.response_mask]
    torch.testing.assert_close(trained, drawn, rtol=0, atol=1e-5)


def test_all_rows_ending_early_still_fill_the_limit(model):
    found = sample(model, [0, 1], uniforms=torch.zeros(2, 6))
    assert found.ids.shape == found.logprobs.shape == (2, 6)
    assert found.lengths.tolist() == [1, 1]


def test_rows_that_have_ended_leave_the_batch(model):
    """What is left goes on as if alone. Two of four rows end at steps 2 and 3: 4, 4, 3 and then 2 are run."""
    uniforms = uniforms_for(0, 1, range(4), 8).clamp(min=0.05)
    uniforms[1, 1] = uniforms[2, 2] = 0.0
    together = sample(model, [0, 1, 2, 3], uniforms=uniforms)
    lengths = together.lengths.tolist()
    assert lengths[1:3] == [2, 3] and max(lengths) == 8
    for row in range(4):
        alone = sample(model, [row], uniforms=uniforms[row : row + 1])
        assert torch.equal(alone.ids[0], together.ids[row])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], rtol=0, atol=1e-5)
        assert alone.computed.tolist() == [len(PROMPTS[row]) + lengths[row] - 1]
    assert together.computed.tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, lengths, strict=True)]


def test_prompts_of_like_length_are_read_together():
    """At most an eighth of a group is padding; here 1 of 12, then 9 of 30 would be."""
    assert sampling.like_lengths([6, 5, 7, 10, 9]) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert sampling.like_lengths([8]) == [slice(0, 1)]


@pytest.mark.parametrize("window", [None, 6])
def test_prompts_read_in_groups_are_as_if_read_as_one(model, monkeypatch, window):
    """Their lengths are unlike, so they are read apart; then as one. A window is shorter than some."""
    config = MistralConfig(**model.config.to_diff_dict() | {"sliding_window": window, "head_dim": 8})
    mistral = MistralForCausalLM(config).eval()
    mistral.load_state_dict(model.state_dict())
    apart = sample(mistral, [0, 1, 2, 3])
    monkeypatch.setattr(sampling, "IDLE_SHARE", 1.0)
    together = sample(mistral, [0, 1, 2, 3])
    assert apart.computed.sum() < together.computed.sum()
    assert torch.equal(apart.ids, together.ids)
    torch.testing.assert_close(apart.logprobs, together.logprobs, rtol=0, atol=1e-5)


def test_generation_defaults_of_the_model_are_ignored_and_kept(model):
    expected = sample(model, [0, 1])
    defaults = model.generation_config
    defaults.repetition_penalty, defaults.min_new_tokens = 5.0, 9
    try:
        found = sample(model, [0, 1])
        assert torch.equal(found.ids, expected.ids)
        assert model.generation_config is defaults
    finally:
        defaults.repetition_penalty, defaults.min_new_tokens = None, None
