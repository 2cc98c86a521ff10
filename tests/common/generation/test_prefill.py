"""Prompts: like lengths together, and each once."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.generation import prefill
from common.generation.decoding import sample_responses, uniforms_for
from common.generation.prefill import first_rows
from tests.common.generation.test_decoding import FAMILIES, PAD, PROMPTS, VOCABULARY, model

__all__ = ["model"]  # a fixture

REPEATED = [PROMPTS[row] for row in (0, 0, 0, 1, 2, 2, 0, 3, 3)]


def test_prompts_of_similar_length_share_a_forward_pass():
    """At most 1/8 of a group is padding. Here 1 of 12 is; with the third prompt 3 of 21 would be."""
    assert prefill.group_by_length([6, 5, 7, 10, 9]) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert prefill.group_by_length([8]) == [slice(0, 1)]


def test_first_rows_of_neighbouring_equal_prompts():
    """A prompt that begins with the pad token is another one than that without it."""
    ids = torch.tensor([[PAD, 5, 6], [PAD, 5, 6], [7, 5, 6], [PAD, 5, 6], [PAD, 5, 6]])
    assert first_rows(ids, [2, 2, 3, 2, 3]) == [0, 2, 3, 4]
    assert first_rows(ids[:1], [2]) == [0]


def sample(model, prompts, uniforms):
    return sample_responses(model, prompts, uniforms, 0.7, 1.0, 0, PAD, synced_gpus=False)


def prompt_rows(model, run):
    """Rows of each forward pass over prompts, in `run`."""
    shapes: list[tuple[int, ...]] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    result = run()
    hook.remove()
    return result, [shape for shape in shapes if shape[1] > 1]


def check_rows_alone(model, prompts, uniforms, together) -> None:
    """Responses are those to each row alone."""
    for row, prompt in enumerate(prompts):
        alone = sample(model, [prompt], uniforms[row : row + 1])
        assert torch.equal(alone.ids[0], together.ids[row])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], rtol=0, atol=2e-5)


def test_a_prompt_with_several_responses_is_read_once(model):
    prompts = [prompt for prompt in REPEATED if len(prompt) > 1]  # one token looks like a step here
    uniforms = uniforms_for(0, 1, range(len(prompts)), 8)
    responses, shapes = prompt_rows(model, lambda: sample(model, prompts, uniforms))
    assert shapes == [(1, 3), (1, 8), (1, 3), (1, 2)]
    assert responses.computed.tolist() == [
        read + length - 1
        for read, length in zip([3, 0, 0, 8, 0, 3, 2, 0], responses.lengths.tolist(), strict=True)
    ]
    check_rows_alone(model, prompts, uniforms, responses)


@pytest.mark.parametrize("name", FAMILIES)
def test_repeated_prompts_of_other_families(name):
    """Their caches are repeated by transformers. Recurrent states: one pass over all five."""
    config = FAMILIES[name]
    config.vocab_size = VOCABULARY
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    uniforms = uniforms_for(0, 1, range(len(REPEATED)), 8)
    together, shapes = prompt_rows(model, lambda: sample(model, REPEATED, uniforms))
    assert shapes[0] == ((1, 3) if name == "phi3" else (5, 8))
    check_rows_alone(model, REPEATED, uniforms, together)
