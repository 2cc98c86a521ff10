"""Responses that share a prompt get the scores that plain transformers gives each separately."""

from functools import cache
from itertools import combinations

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
)

from step2_reward.data import Layout, Preference, collate
from step2_reward.loss import pairwise_loss
from step2_reward.options import RewardOptions
from step2_reward.shared_prompt import can_share_prompts, choose_layout, pair_scores, tokens_per_pair, work
from tests.conftest import assert_close

PAD, VOCABULARY = 0, 50
GENERAL = {
    "vocab_size": VOCABULARY, "num_labels": 1, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
SHAPE = GENERAL | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, eager": LlamaConfig(**SHAPE, attn_implementation="eager"),
    "gpt2": GPT2Config(**GENERAL, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "opt": OPTConfig(
        **GENERAL, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3,
    ),
    "wide window": MistralConfig(**SHAPE, sliding_window=32),
    "narrow window": MistralConfig(**SHAPE, sliding_window=8),
    "alibi": BloomConfig(**GENERAL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "flash": LlamaConfig(**SHAPE),
}  # fmt: skip
# Five responses of different lengths to one prompt and two to another, with ties.
RANKS = [[0.0, 1.0, 1.0, 2.0, 5.0], [0.0, 1.0]]


@cache
def make(name: str, dtype: torch.dtype = torch.double) -> torch.nn.Module:
    """An untrained classifier; double precision makes rounding negligible."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[name]).to(dtype).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


def make_rows() -> list[Preference]:
    rows, generator = [], torch.Generator().manual_seed(1)
    for ranks, start in zip(RANKS, (6, 9), strict=True):
        lengths = torch.randint(2, 12, (len(ranks),), generator=generator).tolist()
        prompt = torch.randint(2, VOCABULARY, (start,), generator=generator).tolist()
        responses = torch.randint(2, VOCABULARY, (sum(lengths),), generator=generator).tolist()
        rows.append(Preference(prompt, responses, lengths, ranks))
    return rows


def step_loss(model: torch.nn.Module, rows: list[Preference], share_prompts: bool) -> torch.Tensor:
    """Compute the loss of these records as training does."""
    batch = collate(rows, Layout(PAD, share_prompts))
    better, worse = pair_scores(model, batch)
    losses = pairwise_loss(better, worse, batch.margins, torch.where(batch.is_tie, 0.5, 1.0))
    return (losses * batch.weights).sum() / len(rows)


def brute_force(model: torch.nn.Module, rows: list[Preference]) -> torch.Tensor:
    """Compute the loss from its definition: one forward pass of transformers per response, pair by pair."""
    total = torch.zeros((), dtype=torch.double)
    for row in rows:
        dialogues = [torch.tensor([row.prompt_ids + response]) for response in row.responses]
        scores = [model(ids).logits[0, 0] for ids in dialogues]
        losses = []
        for (r, a), (s, b) in combinations(zip(row.ranks, scores, strict=True), 2):
            a_wins, b_wins = -torch.log(torch.sigmoid(a - b)), -torch.log(torch.sigmoid(b - a))
            losses.append((a_wins + b_wins) / 2 if r == s else a_wins)
        total = total + torch.stack(losses).mean()
    return total / len(rows)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama, eager", "gpt2", "opt", "wide window"])
def test_loss_and_gradients_match_separately_scored_pairs(name, share_prompts):
    model, rows = make(name), make_rows()
    expected, loss = brute_force(model, rows), step_loss(model, rows, share_prompts)
    assert_close(loss.double(), expected)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    expected_gradients, gradients = (
        torch.autograd.grad(value, weights, allow_unused=True) for value in (expected, loss)
    )
    assert_close(gradients, expected_gradients)


def test_records_weigh_the_same_and_a_pair_has_the_pairwise_loss():
    model, rows = make("llama"), make_rows()
    separate = torch.stack([step_loss(model, [row], share_prompts=True) for row in rows])
    assert_close(step_loss(model, rows, share_prompts=True), separate.mean())
    better, worse = pair_scores(model, collate(rows[1:], Layout(PAD)))
    assert_close(separate[1].double(), -torch.nn.functional.logsigmoid(better - worse)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_cannot_share_prompts_are_detected(name):
    model = make(name, torch.float)
    if name == "flash":
        model.config._attn_implementation = (
            "flash_attention_2"  # refused by name: the kernels are not installed
        )
    assert can_share_prompts(model, 24) == (name not in ("narrow window", "alibi", "flash"))


def test_a_model_that_ignores_position_ids_is_detected():
    class Stubborn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = make("llama", torch.float)

        def forward(self, **inputs: torch.Tensor) -> object:
            return self.module(**(inputs | {"position_ids": None}))

    assert not can_share_prompts(Stubborn(), 24)


def test_auto_shares_prompts_where_it_is_less_work():
    """That is with long prompts, or in wide models, where attention is a small part of the work."""
    rows = [Preference([1] * 10, [1] * 9, [2, 3, 4], [0.0, 1.0, 2.0])]
    assert tokens_per_pair(rows, Layout(PAD, share_prompts=True)) == (19 / 3, 26)
    assert tokens_per_pair(rows, Layout(PAD)) == (13, 26)
    assert work(rows, Layout(PAD, share_prompts=True), 8) == 19 * (12 * 8 + 2 * 19)
    assert work(rows, Layout(PAD), 8) == 3 * 14 * (12 * 8 + 14)
    short = [Preference([1], [1] * 400, [200, 200], [0.0, 1.0])]
    for model, data, shares in (
        (make("llama", torch.float), rows, {"auto": True, "yes": True, "no": False}),
        (make("llama", torch.float), short, {"auto": False, "yes": True, "no": False}),
        (make("alibi", torch.float), rows, {"auto": False, "yes": False, "no": False}),
    ):
        for value, expected in shares.items():
            options = RewardOptions(max_length=24, share_prompts=value)
            assert choose_layout(model, data, options) == Layout(PAD, expected)
