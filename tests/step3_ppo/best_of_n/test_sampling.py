"""Sampling and scoring of one chunk, in process."""

import contextlib
import json
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.generation.generate import PlainEngine
from common.model.reward_ensemble import RewardModel
from common.text.prompts import Prompt
from step3_ppo.best_of_n.main import sample_and_score
from step3_ppo.best_of_n.options import BestOfNOptions
from step3_ppo.models import Scorer
from tests.byte_encoder import byte_encoder

TEXTS = ["Two birds sing in a tree", "It rains in the garden"]


def tiny(kind: type, rows: int) -> torch.nn.Module:
    torch.manual_seed(rows)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return kind(config).eval()


def test_a_reward_model_reads_a_prompt_once_and_gives_the_same_scores():
    encoder = byte_encoder("{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = len(encoder.tokenizer)
    policy, reward = PlainEngine(tiny(LlamaForCausalLM, rows)), tiny(LlamaForSequenceClassification, rows)
    policy.module.num_tokens, policy.module.end_ids = rows, [encoder.eos_token_id, *range(200, 230)]
    options = BestOfNOptions(samples_per_prompt=4, generation_batch_size=8, max_response_length=7, seed=1)
    scorer = Scorer([RewardModel(encoder, partial(contextlib.nullcontext, reward))], [], options)
    prompts = [Prompt(encoder.tokenizer(text).input_ids, json.dumps({"prompt": text})) for text in TEXTS]
    tokens, samples = [], []
    for hidden_size in (0, 10_000):  # attention alone; hardly any attention
        read = []
        watch = reward.model.embed_tokens.register_forward_hook(
            lambda _, ids, __, to=read: to.append(ids[0].numel())
        )
        samples.append(sample_and_score(policy, scorer, encoder, prompts, range(8), options, hidden_size))
        watch.remove()
        tokens.append(read[-1])
    separate, shared = samples
    assert len({sample["completion"] for sample in separate}) > 4
    assert tokens[1] < 0.6 * tokens[0]
    for one, other in zip(separate, shared, strict=True):
        assert one["completion"] == other["completion"]
        assert one["score"] == pytest.approx(other["score"], abs=2e-6)
