"""Sampling: correct distribution, correct logprobs, and rows independent of each other."""

import math

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
from common.generation import prefill
from common.generation.decoding import Responses, sample_responses, uniforms_for
from step3_ppo.rollout import Rollout, policy_pass
from tests.conftest import assert_close
from tests.step3_ppo.rollouts import rollout_of

EOS, PAD, VOCABULARY = 0, 39, 40
PROBABILITIES = torch.tensor([0.05, 0.5, 0.0, 0.3, 0.15])
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [17, 18]]
TEMPERATURE = 0.7


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature=1.0, top_p=1.0, top_k=0):
    """Tokens (B,) and their logprobs, for logits (V,) or (B, V) and one uniform number per row."""
    tokens, logprobs, _ = sampling.draw(logits.expand(len(uniforms), -1), uniforms, temperature, top_p, top_k)
    return tokens, logprobs


def test_token_frequencies_follow_the_distribution():
    count = 4000
    tokens, _ = draw(PROBABILITIES.log(), uniforms_for(0, 1, range(count), 1)[:, 0])
    counts = tokens.bincount(minlength=5)
    assert counts[2] == 0
    expected = count * PROBABILITIES
    chi_square = ((counts - expected) ** 2 / expected)[PROBABILITIES > 0].sum()
    assert chi_square < 16.3, "three degrees of freedom, p = 0.001"


def test_evenly_spaced_uniforms_give_exact_frequencies():
    count = 10_000
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    tokens, logprobs = draw(logits, (torch.arange(count) + 0.5) / count, temperature=2.0)
    exact = (logits.double() / 2.0).softmax(-1)
    assert (tokens.bincount(minlength=4) - count * exact).abs().max() <= 1
    assert_close(logprobs, exact.log().float()[tokens])


def test_uniforms_at_both_ends_of_the_range():
    tokens, _ = draw(torch.tensor([[0.0, 0.0, float("-inf")]]), torch.tensor([0.0, 1 - 2**-24]))
    assert tokens.tolist() == [0, 1]
    tokens, _ = draw(torch.tensor([[float("-inf"), 0.0, 0.0]]), torch.tensor([0.0]))
    assert tokens.tolist() == [1], "tokens with probability 0 are never drawn"


@pytest.mark.parametrize("cut", [{"top_p": 0.6}, {"top_k": 2}, {"top_p": 0.6, "top_k": 4}])
def test_logprobs_match_the_sampling_distribution(cut):
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
    return rollout_of(
        torch.tensor([row + [PAD] * (width - len(row)) for row in rows]),
        torch.tensor([len(p) for p in PROMPTS]), responses.lengths, responses.ended,
        logprobs=responses.logprobs, support_sizes=responses.support_sizes,
        support_ids=responses.support_ids.split(responses.support_sizes.sum(1).tolist()),
    )  # fmt: skip


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.7, 0), (1.0, 3), (0.7, 9)])
def test_logprobs_match_the_training_pass(model, top_p, top_k):
    """Generation pads on the left and uses a cache; the update pads on the right without one. The support of
    top_p and top_k is that of transformers, except for one extra token there when the sum equals top_p.
    """
    responses = sample(model, [0, 1, 2, 3], top_p=top_p, top_k=top_k)
    lengths = responses.lengths.tolist()
    rollout = as_rollout(responses)
    rows = [rollout.prompt(row) + rollout.response(row) for row in range(4)]
    with torch.no_grad():
        trained, *_ = policy_pass(model, rollout.rows([0, 1, 2, 3]), TEMPERATURE)
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
    drawn = responses.logprobs[rollout.response_mask]
    torch.testing.assert_close(trained, drawn, rtol=0, atol=1e-5)
    for row, (ids, logits, prompt) in enumerate(zip(rows, alone, PROMPTS, strict=True)):
        exact = logits.double() / TEMPERATURE
        if top_k:
            exact = TopKLogitsWarper(top_k)(None, exact)
        exact = TopPLogitsWarper(top_p)(None, exact).log_softmax(-1)
        expected = [exact[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        sampled = responses.logprobs[row, : lengths[row]]
        torch.testing.assert_close(sampled, torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_response_does_not_depend_on_the_batch(model):
    together = sample(model, [0, 1, 2, 3])
    for row in range(4):
        alone = sample(model, [row])
        assert torch.equal(alone.ids[0], together.ids[row])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], rtol=0, atol=1e-5)
    reversed_order = sample(model, [3, 2, 1, 0])
    assert torch.equal(reversed_order.ids.flip(0), together.ids)


def test_eos_ends_a_response_and_counts_as_a_token(model):
    """EOS has id 0, so the uniform number 0 draws it and a number near 1 never does."""
    uniforms = torch.full((3, 6), 0.999)
    uniforms[1, 2] = 0.0
    uniforms[2, [0, 4]] = 0.0
    responses = sample(model, [0, 1, 2], uniforms=uniforms)
    assert responses.lengths.tolist() == [6, 3, 1]
    assert responses.ended.tolist() == [False, True, True]
    assert (responses.ids[0] != EOS).all()
    assert responses.ids[1, 2] == EOS and (responses.ids[1, 3:] == PAD).all()
    assert responses.ids[2].tolist() == [EOS] + [PAD] * 5
    mask = torch.arange(6) < responses.lengths[:, None]
    assert (responses.logprobs[mask] < 0).all() and not responses.logprobs[~mask].any()


def test_each_of_several_end_tokens_ends_a_response(model):
    """The uniform number 0 draws the first id, a number near 1 the last one."""
    uniforms = torch.full((3, 6), 0.5)
    uniforms[1, 2], uniforms[2, 4] = 0.0, 1 - 2**-24
    responses = sample(model, [0, 1, 2], uniforms=uniforms, ends=[EOS, 37], num_tokens=38)
    lengths, ended = responses.lengths.tolist(), responses.ended.tolist()
    assert (lengths[1:], ended[1:]) == ([3, 5], [True, True])
    assert (responses.ids[1, 2], responses.ids[2, 4]) == (EOS, 37)
    assert sample(model, [2], uniforms=uniforms[2:], num_tokens=38).lengths.tolist() == [6]
    assert responses.computed.tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, lengths, strict=False)]


def test_ids_without_a_token_are_never_drawn(model):
    """They have the largest logits; logprobs are those over the tokenizer's ids."""
    count, weight = 30, model.lm_head.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[count:] = 4 * weight[1:2]  # in the direction of a frequent token
        weight[count + 1 :] *= -1
    try:
        model.num_tokens = count
        for cut in ({}, {"top_p": 0.7}, {"top_k": 35}):
            responses = sample(model, [0, 1, 2, 3], num_tokens=count, **cut)
            rollout = as_rollout(responses)
            assert (responses.ids[rollout.response_mask] < count).all()
            with torch.no_grad():
                trained, entropy = policy_pass(model, rollout.rows([0, 1, 2, 3]), TEMPERATURE, "value")
            assert (entropy <= math.log(count)).all()
            drawn = responses.logprobs[rollout.response_mask]
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
def test_rows_of_other_families_are_independent(name):
    """Their caches hold recurrent states, and they prepare inputs in other ways. Two rows end early, and the
    remaining rows must keep their own states.
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
        trained, *_ = policy_pass(model.train(), rollout.rows([0, 1, 2, 3]), TEMPERATURE)
    drawn = together.logprobs[rollout.response_mask]
    torch.testing.assert_close(trained, drawn, rtol=0, atol=1e-5)


def test_outputs_have_full_width_when_all_rows_end_early(model):
    responses = sample(model, [0, 1], uniforms=torch.zeros(2, 6))
    assert responses.ids.shape == responses.logprobs.shape == (2, 6)
    assert responses.lengths.tolist() == [1, 1]


def test_finished_rows_leave_the_batch(model):
    """The remaining rows continue as if alone. Of 4 rows one ends at step 2 and one at step 3."""
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


@pytest.mark.parametrize("window", [None, 6])
def test_prefill_in_groups_matches_prefill_at_once(model, monkeypatch, window):
    """First in groups by length, then in one batch. The sliding window is shorter than some prompts."""
    config = MistralConfig(**model.config.to_diff_dict() | {"sliding_window": window, "head_dim": 8})
    mistral = MistralForCausalLM(config).eval()
    mistral.load_state_dict(model.state_dict())
    apart = sample(mistral, [0, 1, 2, 3])
    monkeypatch.setattr(prefill, "IDLE_SHARE", 1.0)
    together = sample(mistral, [0, 1, 2, 3])
    assert apart.computed.sum() < together.computed.sum()
    assert torch.equal(apart.ids, together.ids)
    torch.testing.assert_close(apart.logprobs, together.logprobs, rtol=0, atol=1e-5)


def test_generation_defaults_of_the_model_are_ignored_and_restored(model):
    expected = sample(model, [0, 1])
    defaults = model.generation_config
    defaults.repetition_penalty, defaults.min_new_tokens = 5.0, 9
    try:
        responses = sample(model, [0, 1])
        assert torch.equal(responses.ids, expected.ids)
        assert model.generation_config is defaults
    finally:
        defaults.repetition_penalty, defaults.min_new_tokens = None, None
