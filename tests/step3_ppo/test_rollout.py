"""Responses that share a row with their prompt, compared with single rows; the order of minibatches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from common.data.batching import Tokens
from common.model.shared_prompt import Sharing
from step3_ppo import rollout as module
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout, minibatches, policy_pass
from step3_ppo.scoring import _rank_batches, _value_pass
from step3_ppo.shared_prompt import share_prompts
from tests.conftest import assert_close
from tests.step3_ppo.rollouts import rollout_of

PROMPTS, RESPONSES = [3, 3, 3, 3, 1, 1, 1, 1], [2, 5, 1, 4, 3, 1, 5, 5]
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_labels=1, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture
def rollout() -> Rollout:
    """Four responses to each of two prompts; behind a response, input_ids are not padding but noise."""
    ids = torch.randint(1, 32, (8, 8), generator=torch.Generator().manual_seed(1))
    ids[:4, :3], ids[4:, :1] = ids[0, :3].clone(), ids[4, :1].clone()
    ended = torch.tensor([True, False] * 4)
    return rollout_of(ids, torch.tensor(PROMPTS), torch.tensor(RESPONSES), ended)


def sharing(rollout: Rollout, count: int) -> Rollout:
    return replace(rollout, sharing=Sharing(count, 3, 5))


def texts(rollout: Rollout, batch: list[int]) -> list[torch.Tensor]:
    return [torch.tensor([rollout.prompt(row) + rollout.response(row)]) for row in batch]


def test_layout_of_two_rows(rollout: Rollout) -> None:
    rows = sharing(rollout, 2).rows([4, 5, 0, 1])
    ids = [[*rollout.prompt(4), *rollout.response(4), *rollout.response(5)]]
    ids.append([*rollout.prompt(0), *rollout.response(0), *rollout.response(1)])
    position_ids, segments = rows.shared
    assert rows.input_ids[0, :5].tolist() == ids[0] and rows.input_ids[1].tolist() == ids[1]
    assert position_ids[0, :5].tolist() == [0, 1, 2, 3, 1]
    assert position_ids[1].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert segments.tolist() == [[0, 1, 1, 1, 2] + [-1] * 5, [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]]
    assert [*zip(*map(torch.Tensor.tolist, rows.positions), strict=True)] == [
        (0, 0), (0, 1), (0, 2), (0, 0), (1, 2), (1, 3), (1, 2), (1, 5), (1, 6), (1, 7), (1, 8),
    ]  # fmt: skip
    assert [*zip(*map(torch.Tensor.tolist, rows.ends), strict=True)] == [(0, 3), (0, 4), (1, 4), (1, 9)]
    assert rows.labels.tolist() == sum(map(rollout.response, (4, 5, 0, 1)), [])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_logprobs_and_their_gradients(rollout: Rollout, count: int) -> None:
    """As plain transformers gives them for each response alone."""
    torch.manual_seed(0)
    actor, batch, weights = LlamaForCausalLM(CONFIG).double(), [4, 5, 6, 7, 0, 1, 2, 3], []
    actor.num_tokens = 32
    expected = []
    for row, ids in zip(batch, texts(rollout, batch), strict=True):
        logprobs = (actor(ids).logits[0] / 0.7).log_softmax(-1)
        expected += [logprobs[PROMPTS[row] + t - 1, token] for t, token in enumerate(rollout.response(row))]
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(2))
    result = policy_pass(actor, sharing(rollout, count).rows(batch), 0.7).logprobs
    assert_close(result.double(), torch.stack(expected))
    sums = (weights * result).sum(), (weights * torch.stack(expected)).sum()
    assert_close(*(torch.autograd.grad(value, [*actor.parameters()]) for value in sums))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_values(rollout: Rollout, count: int, bootstrap: bool) -> None:
    torch.manual_seed(0)
    critic, batch = LlamaForSequenceClassification(CONFIG).eval(), [0, 1, 2, 3, 4, 5, 6, 7]
    with torch.no_grad():
        single = [critic.score(critic.model(ids)[0][0])[:, 0] for ids in texts(rollout, batch)]
        values, last = _value_pass(
            critic, sharing(rollout, count), batch, PPOOptions(bootstrap_truncated=bootstrap)
        )
    expected = [one[PROMPTS[row] - 1 : -1] for row, one in zip(batch, single, strict=True)]
    assert_close(values, torch.cat(expected))
    after = [one[-1] * (bootstrap and not rollout.ended[row]) for row, one in zip(batch, single, strict=True)]
    assert_close(last, torch.stack(after))


@pytest.mark.parametrize("rank", [0, 1])
def test_responses_of_a_row_stay_together(
    rollout: Rollout, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 5, 8, 10 and 11 tokens, each of two responses; one fills a micro-batch of 2 or of 12 tokens."""
    monkeypatch.setattr(module, "rank", lambda: rank)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    shared, batch = sharing(rollout, 2), [0, 1, 2, 3, 5, 4, 6, 7]
    assert shared.units(batch) == ([[0, 1], [2, 3], [5, 4], [6, 7]], [10, 8, 5, 11])
    by_rank = {0: [[5, 4], [0, 1]], 1: [[2, 3], [6, 7]]}
    assert shared.deal(batch, 2) == shared.deal(batch, 3) == shared.deal(batch, Tokens(12)) == by_rank[rank]
    assert shared.deal(batch, 4) == [[5, 4, 2, 3]] * (rank == 0) + [[0, 1, 6, 7]] * (rank == 1)


def test_all_responses_are_scored(rollout: Rollout) -> None:
    assert _rank_batches(sharing(rollout, 2), 2) == [[4, 5], [2, 3], [0, 1], [6, 7]]
    assert _rank_batches(sharing(rollout, 4), 3) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert _rank_batches(rollout, 4) == [[5, 2, 4, 0], [6, 7, 3, 1]]


def test_the_responses_to_a_prompt_are_in_one_minibatch() -> None:
    epochs = [*minibatches(12, 6, 2, seed=1, step=2, group=3)]
    assert [len(batch) for batch in epochs] == [6] * 4
    for batch in epochs:
        assert all(batch[i : i + 3] == [*range(batch[i], batch[i] + 3)] and batch[i] % 3 == 0 for i in (0, 3))
    assert sorted(epochs[0] + epochs[1]) == sorted(epochs[2] + epochs[3]) == [*range(12)]


def test_groups_that_do_not_fit_are_divided() -> None:
    """As without groups: each response has a random minibatch."""
    assert [*minibatches(12, 4, 2, 1, 2, group=3)] == [*minibatches(12, 4, 2, 1, 2)]
    batch = next(minibatches(12, 4, 1, 1, 2, group=3))
    assert {*batch} not in [{*range(n, n + 4)} for n in range(9)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"samples_per_prompt": 8, "micro_batch_size": 4}, 4),
        ({"samples_per_prompt": 6, "global_batch_size": 24, "micro_batch_size": 4}, 2),
        ({"samples_per_prompt": 3, "global_batch_size": 24, "micro_batch_size": 4}, 1),
        ({"samples_per_prompt": 3, "global_batch_size": 24, "micro_batch_size": 8}, 1),
        ({"samples_per_prompt": 4, "global_batch_size": 8, "micro_batch_size": 3}, 2),  # 3 becomes 2
        ({"samples_per_prompt": 8, "global_batch_size": 4, "micro_batch_size": 4}, 1),
        ({"samples_per_prompt": 1}, 1),
        ({"samples_per_prompt": 8, "global_batch_size": 16, "micro_batch_tokens": 900}, 8),
        ({"samples_per_prompt": 8, "global_batch_size": 16, "micro_batch_tokens": 899}, 4),
        ({"samples_per_prompt": 8, "global_batch_size": 16, "micro_batch_tokens": 10}, 1),
        ({"samples_per_prompt": 12, "global_batch_size": 12, "micro_batch_tokens": 10**6}, 12),
    ],
)
def test_responses_per_row(options: dict[str, int], expected: int) -> None:
    rows = {"max_prompt_length": 100, "max_response_length": 100}
    assert PPOOptions(**rows, **options).responses_per_row == expected


def test_responses_per_row_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has half of a minibatch."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {"samples_per_prompt": 8, "global_batch_size": 8, "micro_batch_size": 8}
    assert PPOOptions(**options).responses_per_row == 4
    assert PPOOptions(**options, micro_batch_tokens=10**6).responses_per_row == 4


@pytest.mark.parametrize(
    ("value", "hidden_size", "expected"), [("auto", 16, 2), ("auto", 2, 1), ("yes", 2, 2), ("no", 16, 1)]
)
def test_a_rollout_shares_prompts(rollout: Rollout, value: str, hidden_size: int, expected: int) -> None:
    """auto: if hidden states are wide enough for the mask to cost less than the prompts."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=hidden_size, num_attention_heads=1, head_dim=4, intermediate_size=4,
        num_hidden_layers=1, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    models = SimpleNamespace(actor=LlamaForCausalLM(config), critic=LlamaForSequenceClassification(config))
    options = PPOOptions(
        samples_per_prompt=4, micro_batch_size=2, share_prompts=value, max_prompt_length=3,
        max_response_length=5,
    )  # fmt: skip
    assert share_prompts(models, rollout, options).sharing.responses == expected
    models.critic.config._attn_implementation = "flash_attention_2"
    assert share_prompts(models, rollout, replace(options, max_prompt_length=4)).sharing.responses == 1
