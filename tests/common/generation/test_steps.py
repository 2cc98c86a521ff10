"""Decoding steps of all families against forward passes without a cache."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, FalconConfig

from common.generation import decoding
from common.generation.decoding import open_rows, sample_responses, uniforms_for
from common.generation.steps import DirectSteps
from tests.common.generation.test_decoding import model
from tests.end_to_end.test_families import COMPLETE, POLICIES

__all__ = ["model"]  # a fixture

EOS, PAD, VOCABULARY, LIMIT = 0, 1, 40, 12
PROMPTS = [[5, 6, 7], [8, 9], [8, 9], [9, 10, 11, 12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22, 23, 24]]
ALIBI = {"falcon_alibi": FalconConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2, alibi=True
)}  # fmt: skip
CONFIGS = COMPLETE | POLICIES | ALIBI
# The others have sliding windows, recurrent states, position biases, or prepare their inputs themselves.
DIRECT = {"llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "falcon", "opt", "gpt2", "gpt_neox",
          "olmo2", "cohere"}  # fmt: skip


def make_model(name: str):
    config = CONFIGS[name]
    text = config.get_text_config()
    text.vocab_size = VOCABULARY
    for token in ("bos", "eos", "pad"):
        setattr(text, f"{token}_token_id", PAD)
    if text is not config:
        config.image_token_id = VOCABULARY - 1
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(config).eval()


def sample(model, uniforms=None, ends=EOS, limit=LIMIT):
    uniforms = uniforms_for(0, 1, range(len(PROMPTS)), limit) if uniforms is None else uniforms
    return sample_responses(model, PROMPTS, uniforms, 1.0, 1.0, ends, PAD, synced_gpus=False)


@pytest.fixture
def direct(monkeypatch) -> list[DirectSteps]:
    """Those made in the test."""
    made = []
    initialise = DirectSteps.__init__

    def record(steps, *arguments):
        made.append(steps)
        initialise(steps, *arguments)

    monkeypatch.setattr(DirectSteps, "__init__", record)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_a_pass_without_cache(direct, name):
    """Two rows end early and leave; later one of the padded ones does."""
    model = make_model(name)
    uniforms = uniforms_for(0, 1, range(len(PROMPTS)), LIMIT).clamp(min=0.1)
    uniforms[3, 2] = uniforms[1, 2] = uniforms[0, 6] = 0.0  # draws EOS
    responses = sample(model, uniforms)
    assert len(direct) == (name in DIRECT)
    assert [responses.lengths[row].item() <= most for row, most in ((3, 3), (1, 3), (0, 7))] == [True] * 3
    for row, prompt in enumerate(PROMPTS):
        ids = responses.ids[row, : responses.lengths[row]]
        full = torch.tensor([prompt + ids.tolist()])
        with torch.no_grad():
            logprobs = model(full, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(-1, ids[:, None]).squeeze(-1)
        torch.testing.assert_close(responses.logprobs[row, : len(ids)], expected, rtol=0, atol=2e-5)


class Reads(TorchDispatchMode):
    """Counts the reads of values by the host, which waits for the GPU then."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize("every", [1, 8])
def test_the_host_reads_once_per_look(model, monkeypatch, every):
    """In 16 further steps, in which no row leaves."""
    monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", every)
    tolist, counts = torch.Tensor.tolist, []
    for limit in (10, 26):
        with Reads() as reads, monkeypatch.context() as patch:

            def read(tensor, reads=reads):
                reads.count += 1
                return tolist(tensor)

            patch.setattr(torch.Tensor, "tolist", read)
            sample(model, ends=VOCABULARY, limit=limit)
        counts.append(reads.count)
    assert counts[1] - counts[0] == 16 // every


def test_responses_do_not_depend_on_the_steps_between_looks(model, monkeypatch):
    expected = sample(model, limit=30)
    assert expected.ended.any() and not expected.ended.all()
    for every in (3, 8, 100):
        monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", every)
        responses = sample(model, limit=30)
        assert torch.equal(responses.ids, expected.ids) and torch.equal(responses.ended, expected.ended)
        torch.testing.assert_close(responses.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        assert (responses.computed >= expected.computed).all()


def test_one_token_needs_no_step(model):
    assert sample(model, limit=1).lengths.tolist() == [1] * len(PROMPTS)


def test_few_rows_move():
    assert open_rows([False, True, True, False, True, True]) == [4, 1, 2, 5]
    assert open_rows([True, False, False]) == [0] and open_rows([False, False]) == []
