"""Cases of vLLM that run in processes of their own, because it changes the process: `main` runs one by name.

succeed("tests.common.generation.vllm_cases", ["plain_policy", FOLDER], FOLDER)
"""

import inspect
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from common.generation.decoding import Responses
from common.generation.engine_checks import FAMILIES, check_rollout_engine
from common.generation.generate import PlainEngine, Sampler, generate, load_policy, make_sampler
from common.generation.options import GenerationOptions
from common.generation.vllm_sampler import VllmSampler
from common.model.engine import backward_and_step, gathered_weights, make_engine
from common.model.forward import base_model
from common.model.loading import load_causal_lm
from common.model.lora import add_adapters
from common.model.zero import load_zero_config
from common.runtime.distributed import init_distributed, rank, sum_over_ranks
from common.runtime.options import LoraOptions, OptimiserOptions, world_size
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from tests.stages import ZERO

PROMPTS = [[9, 5, 6, 7], [8], [9, 5, 6, 7, 12, 13], [17, 18], [9, 5, 6, 7]]
LENGTH, TEMPERATURE, RATE = 12, 0.7, 0.02


def options(ranks: int = 1, **settings: Any) -> GenerationOptions:
    result = GenerationOptions(
        generation_batch_size=4, max_prompt_length=8, max_response_length=LENGTH, temperature=TEMPERATURE,
        rollout_engine="vllm", rollout_tensor_parallel=ranks, **settings,
    )  # fmt: skip
    result.seed = 3
    return result


def sample(
    sampler: Sampler, encoder: SegmentEncoder, rows: Sequence[int], ranks: int = 1, **settings: Any
) -> Responses:
    return generate(sampler, encoder, PROMPTS, rows, options(ranks, **settings), step=1)


@torch.no_grad()
def gap(policy: Any, rows: Sequence[int], responses: Responses) -> float:
    """Largest difference from the log-probabilities of a plain forward pass of transformers, row by row."""
    largest = 0.0
    with gathered_weights(policy) as module:
        model = base_model(module)
        for row, ids, length, drawn in zip(rows, *responses[:2], responses.logprobs, strict=True):
            tokens = ids[:length]
            inputs = torch.tensor([PROMPTS[row] + tokens.tolist()])
            logits = model(inputs).logits[0, len(PROMPTS[row]) - 1 : -1, : model.num_tokens]
            exact = (logits.double() / TEMPERATURE).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            largest = max(largest, float((drawn[:length] - exact).abs().max()))
    return largest


def states() -> list[Any]:
    """Of all random generators, and the number of threads."""
    generators = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    return [*generators, torch.get_num_threads()]


def check_equal(one: Responses, other: Responses, order: Sequence[int]) -> None:
    """The same tokens; log-probabilities up to rounding, which depends on the rows of a batch."""
    order = [*order]
    assert one.ids.tolist() == other.ids[order].tolist(), (one, other, order)
    assert torch.equal(one.ended, other.ended[order]) and torch.equal(one.lengths, other.lengths[order])
    torch.testing.assert_close(one.logprobs, other.logprobs[order], rtol=0, atol=1e-4)


def plain_policy(folder: str) -> None:
    """One rank, a frozen policy whose weights then change."""
    encoder = SegmentEncoder(load_tokenizer(folder))
    policy = load_policy(folder, encoder, load_zero_config(str(ZERO / "zero0.json"), OptimiserOptions(), 1.0))
    model = base_model(policy)
    model.end_ids = [*range(9, model.num_tokens, 16)]
    rows, before = range(len(PROMPTS)), states()
    sampler = make_sampler(policy, folder, options())
    assert states() == before
    first = sample(sampler, encoder, rows)
    assert states() == before
    assert gap(policy, rows, first) < 1e-4
    is_end = torch.isin(first.ids, torch.tensor(model.end_ids))
    is_last = torch.arange(LENGTH) == first.lengths[:, None] - 1
    assert torch.equal(is_end, is_last & first.ended[:, None]), (first.ids, first.lengths, first.ended)
    assert 0 < first.ended.sum() < len(rows), first.ended
    assert len({*map(tuple, first.ids[[0, 4]].tolist())}) == 2, "rows with the same prompt differ"

    # Independent of the batch, of the order, and of what was sampled before.
    again = sample(sampler, encoder, [*reversed(rows)])
    check_equal(first, again, [*reversed(rows)])
    check_equal(sample(sampler, encoder, [2]), first, [2])

    # The most likely token, as the other engine finds it.
    greedy = [generate(one, encoder, PROMPTS, rows, options(top_k=1), step=1) for one in (sampler, policy)]
    assert torch.equal(greedy[0].ids, greedy[1].ids)

    # New weights, and old ones where the push is left out.
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert gap(policy, rows, sample(sampler, encoder, rows)) < 1e-4
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    sampler.__dict__["_push_weights"] = lambda: None
    assert gap(policy, rows, sample(sampler, encoder, rows)) > 0.01


def trained_policy(folder: str, stage: str, lora_rank: str, tensor_parallel: str) -> None:
    """An engine in training, before and after an update. Ranks have different rows, and ranks that share the
    weights see those of all.
    """
    encoder = SegmentEncoder(load_tokenizer(folder))
    lora, ranks = LoraOptions(lora_rank=int(lora_rank)), int(tensor_parallel)
    settings = OptimiserOptions(global_batch_size=world_size(), micro_batch_size=1, warmup_ratio=0.0)
    zero = load_zero_config(str(ZERO / f"zero{stage}.json"), settings, RATE)
    model = add_adapters(load_causal_lm(folder, encoder.tokenizer, zero), lora, 0)
    policy = make_engine(model, zero, settings, RATE, total_steps=9)
    sampler = make_sampler(policy, folder, options(ranks))
    rows = range(rank(), len(PROMPTS) - (world_size() == 2), world_size())
    before = sample(sampler, encoder, rows, ranks)
    assert gap(policy, rows, before) < 1e-4
    policy.train()
    for _ in range(3):
        loss = policy(input_ids=torch.tensor([PROMPTS[2] * 3])).logits.logsumexp(-1).mean()
        backward_and_step(policy, loss, world_size(), is_last=True)
    policy.eval()
    after = sample(sampler, encoder, rows, ranks)
    assert gap(policy, rows, after) < 1e-4 < gap(policy, rows, before)
    assert sum_over_ranks(1.0) == [world_size()], "the process group works as before"


def families(folder: str) -> None:
    """Tiny models of all families with random weights, one after the other in this process."""
    shape = {
        "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "initializer_range": 0.15,
        "sliding_window": 8, "init_std": 0.15, "ffn_dim": 96, "word_embed_proj_dim": 128,
    }  # fmt: skip
    for name in FAMILIES:
        torch.manual_seed(0)
        ids = {"vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        known = inspect.signature(CONFIG_MAPPING[name]).parameters
        own = CONFIG_MAPPING[name].attribute_map
        config = CONFIG_MAPPING[name](**ids, **{k: v for k, v in shape.items() if own.get(k, k) in known})
        model = AutoModelForCausalLM.from_config(config).eval()
        model.num_tokens, model.end_ids = 180, [2]
        model.save_pretrained(f"{folder}/{name}")
        check_rollout_engine(options(), model.config)
        sampler = VllmSampler(PlainEngine(model), f"{folder}/{name}", options(), 20)
        responses = sampler.sample(PROMPTS, range(5), options(), 1, 0)
        assert gap(PlainEngine(model), range(5), responses) < 1e-4 and responses.ids.max() < 180, name


def main() -> None:
    name, *words = sys.argv[1:]
    init_distributed(5)
    cases: list[Callable[..., None]] = [plain_policy, trained_policy, families]
    next(case for case in cases if case.__name__ == name)(*words)
