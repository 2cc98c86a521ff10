"""KL of the updates and --max_update_kl, with a plain model and plain SGD."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.optimise import optimise
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout, policy_pass
from tests.step3_ppo.plain_sgd import with_sgd
from tests.step3_ppo.rollouts import rollout_of

ROWS, PROMPT, WIDTH = 4, 3, 5
LENGTHS = [5, 2, 4, 3]


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    return with_sgd(LlamaForCausalLM(config), 1.0, monkeypatch)


@torch.no_grad()
def sampled(actor: LlamaForCausalLM) -> Rollout:
    input_ids, prompts = torch.randint(1, 32, (ROWS, PROMPT + WIDTH)), torch.full((ROWS,), PROMPT)
    rollout = rollout_of(input_ids, prompts, torch.tensor(LENGTHS), torch.ones(ROWS).bool())
    for field in (rollout.behaviour_logprobs, rollout.logprobs):
        field[rollout.response_mask] = logprobs(actor, rollout)
    return rollout


@torch.no_grad()
def logprobs(actor: LlamaForCausalLM, rollout: Rollout) -> torch.Tensor:
    return policy_pass(actor, rollout.rows(range(ROWS)), 1.0).logprobs


def update(actor: LlamaForCausalLM, rollout: Rollout, **more: object) -> dict[str, float]:
    options = PPOOptions(rollout_batch_size=ROWS, micro_batch_size=1, advantage_estimator="rloo", **more)
    models = SimpleNamespace(actor=actor, sampler=actor, critic=None)
    advantages = torch.randn(ROWS, WIDTH)
    metrics = optimise(models, rollout, advantages, None, options, KLPenalty(0.0), None, 1)
    return {name: mean.value for name, mean in metrics.items() if name.startswith("policy/")}


def test_update_kl_includes_the_last_update(actor):
    """Also with one minibatch and one epoch, when no forward pass of training follows it."""
    rollout = sampled(actor)
    metrics = update(actor, rollout, ppo_epochs=1, global_batch_size=ROWS)
    k2 = 0.5 * (logprobs(actor, rollout) - rollout.logprobs[rollout.response_mask]) ** 2
    first = k2[: LENGTHS[0]]  # a quarter of the minibatch
    assert metrics["policy/update_kl"] == pytest.approx(first.sum().item(), rel=1e-5)
    assert metrics["policy/update_kl"] > 1e-4 and metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["policy/ratio"] == pytest.approx(1) and actor.training


@pytest.mark.parametrize("size", [ROWS, 2])
def test_max_update_kl_ends_the_epochs(actor, size):
    """After the first update whose forward pass sees an earlier one."""
    metrics = update(actor, sampled(actor), ppo_epochs=3, global_batch_size=size, max_update_kl=1e-5)
    assert metrics["policy/updates"] == 2 and metrics["policy/update_kl"] > 1e-5
    metrics = update(actor, sampled(actor), ppo_epochs=3, global_batch_size=size, max_update_kl=1e5)
    assert metrics["policy/updates"] == 3 * ROWS / size
