"""Steps of fixed shapes against the eager ones, and the comparison before they are used."""

import pytest
import torch

from common.generation import compiled
from common.generation.compiled import bucket, cache_size
from common.generation.decoding import sample_responses, uniforms_for
from common.generation.guidance import guide
from common.model.q_heads import Heads, q_heads, save_heads
from tests.common.generation.test_decoding import model
from tests.common.generation.test_steps import DIRECT, EOS, LIMIT, PAD, PROMPTS, make_model

__all__ = ["model"]  # a fixture


def sample(model, is_compiled: bool, prompts=PROMPTS, uniforms=None, ends=EOS):
    uniforms = uniforms_for(0, 1, range(len(prompts)), LIMIT) if uniforms is None else uniforms
    return sample_responses(
        model, prompts, uniforms, 1.0, 1.0, ends, PAD, synced_gpus=False, compiled=is_compiled
    )


def check_alike(one, other) -> None:
    assert torch.equal(one.ids, other.ids) and torch.equal(one.computed, other.computed)
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_fixed_shapes_give_the_eager_responses(monkeypatch, capsys, name):
    """Not compiled here. Of five rows three leave; prompts are padded, and one is repeated."""
    model = make_model(name)
    uniforms = uniforms_for(0, 1, range(len(PROMPTS)), LIMIT).clamp(min=0.1)
    uniforms[3, 2] = uniforms[1, 2] = uniforms[0, 6] = 0.0  # draws EOS
    shapes = set()

    def run(*arguments):
        shapes.add(tuple(arguments[2].shape))
        return compiled._step(*arguments)

    monkeypatch.setattr(compiled, "RUN", run)
    expected = sample(model, False, uniforms=uniforms)
    check_alike(sample(model, True, uniforms=uniforms), expected)
    assert shapes <= {(rows, 1, 1, compiled.COLUMN_STEP) for rows in (1, 2, 4, 8)} and len(shapes) > 1
    assert not capsys.readouterr().out


def test_compiled_steps(model, monkeypatch):
    """Traced, without a code generator; prompts without padding, and of several batches."""
    monkeypatch.setattr(compiled, "RUN", torch.compile(compiled._step, backend="eager"))
    for prompts in (PROMPTS, PROMPTS[3:], PROMPTS[:1]):
        check_alike(sample(model, True, prompts), sample(model, False, prompts))


def test_compiled_steps_with_the_heads_of_ilql(monkeypatch, tmp_path):
    """Traced in one graph, as CUDA graphs need it."""
    model = make_model("llama")
    size, plain = (model.config.hidden_size, model.config.vocab_size), sample(model, False)
    save_heads(tmp_path, Heads(*size).state_dict(), q_heads(*size).state_dict(), beta=20.0)
    guide(model, str(tmp_path), -1.0)
    monkeypatch.setattr(compiled, "RUN", torch.compile(compiled._step, backend="eager", fullgraph=True))
    guided = sample(model, False)
    check_alike(sample(model, True), guided)
    assert compiled.compiled_models[model] and not torch.equal(guided.ids, plain.ids)


@pytest.mark.parametrize("fault", ["other logits", "not a number", "error"])
def test_other_logits_fall_back_to_eager_steps(model, monkeypatch, capsys, fault):
    """One line in the log, at the first batch."""
    calls = []

    def run(*arguments):
        calls.append(fault)
        match fault:
            case "other logits":
                return compiled._step(*arguments) * 1.01
            case "not a number":
                return compiled._step(*arguments) * float("nan")
        raise RuntimeError("no compiler\nwith a trace")

    monkeypatch.setattr(compiled, "compiled_models", {})
    monkeypatch.setattr(compiled, "RUN", run)
    expected = sample(model, False)
    for _ in range(2):
        check_alike(sample(model, True), expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--compile_generation: sampling is not compiled: ") and len(calls) == 1
    assert ("no compiler" in line) == (fault == "error")


def test_families_without_fixed_shapes_are_sampled_eagerly(monkeypatch):
    monkeypatch.setattr(compiled, "RUN", None)
    model = make_model("mistral")
    check_alike(sample(model, True), sample(model, False))


def test_sizes():
    assert [bucket(count) for count in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    assert cache_size(5, 127) == (8, 128) and cache_size(4, 128) == (4, 256)
