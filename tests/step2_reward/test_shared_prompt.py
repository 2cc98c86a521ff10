"""Responses that share a prompt get the scores that plain transformers gives each separately."""

from itertools import combinations

import pytest
import torch

from step2_reward.data import Layout, Preference, collate
from step2_reward.loss import pairwise_loss
from step2_reward.options import RewardOptions
from step2_reward.shared_prompt import choose_layout, pair_scores, tokens_per_pair
from tests.common.model.test_shared_prompt import PAD, VOCABULARY, make
from tests.conftest import assert_close

# Five responses of different lengths to one prompt and two to another, with ties.
RANKS = [[0.0, 1.0, 1.0, 2.0, 5.0], [0.0, 1.0]]


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


def test_auto_shares_prompts_where_it_is_less_work():
    """That is with long prompts, or in wide models, where attention is a small part of the work."""
    rows = [Preference([1] * 10, [1] * 9, [2, 3, 4], [0.0, 1.0, 2.0])]
    assert tokens_per_pair(rows, Layout(PAD, share_prompts=True)) == (19 / 3, 26)
    assert tokens_per_pair(rows, Layout(PAD)) == (13, 26)
    assert Layout(PAD, share_prompts=True).shapes(rows) == [(1, 19)]
    assert Layout(PAD).shapes(rows) == [(3, 14)]
    short = [Preference([1], [1] * 400, [200, 200], [0.0, 1.0])]
    for model, data, shares in (
        (make("llama", torch.float), rows, {"auto": True, "yes": True, "no": False}),
        (make("llama", torch.float), short, {"auto": False, "yes": True, "no": False}),
        (make("alibi", torch.float), rows, {"auto": False, "yes": False, "no": False}),
    ):
        for value, expected in shares.items():
            options = RewardOptions(max_length=24, share_prompts=value)
            assert choose_layout(model, data, options) == Layout(PAD, expected)
