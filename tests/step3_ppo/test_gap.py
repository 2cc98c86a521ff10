"""The gap between sampler and trainer: its metrics, wrong samplers, and the weights against it."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.generation.decoding import sample_responses, uniforms_for
from step3_ppo import optimise as module
from step3_ppo import rollout as sampling
from step3_ppo.errors import SamplerError
from step3_ppo.gap import SamplerGap, describe_gap, is_rescored, largest_gap
from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.losses import rollout_weights
from step3_ppo.optimise import optimise
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout, policy_pass
from tests.conftest import assert_close
from tests.end_to_end.test_resume import assert_same_end
from tests.ranks import run_stage, succeed
from tests.stages import ZERO, ppo
from tests.step3_ppo.plain_sgd import with_sgd
from tests.step3_ppo.rollouts import rollout_of

PROMPTS = [[5, 6, 7], [8, 2], [9, 10, 11, 12, 13], [17, 18, 3, 4]]
ROWS, WIDTH, VOCABULARY = len(PROMPTS), 12, 40


def test_metrics_by_hand():
    """Two responses, of two tokens and of one."""
    trainer = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
    sampler = torch.tensor([[-1.5, -1.0], [-0.5, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    k3 = (math.exp(0.5) - 1 - 0.5) + (math.exp(-1.0) - 1 + 1.0)
    weight = math.exp(0.5 - 1.0)
    expected = {
        "rollout/gap_mean": 1.5 / 3, "rollout/gap_max": 1.0, "rollout/gap_kl": k3 / 3,
        "rollout/ess": (weight + 1) ** 2 / (weight**2 + 1) / 2,
    }  # fmt: skip
    assert describe_gap(trainer, sampler, mask) == pytest.approx(expected)


def test_metrics_of_equal_and_of_distant_numbers():
    logprobs, mask = -torch.rand(4, 3), torch.ones(4, 3, dtype=torch.bool)
    same = describe_gap(logprobs, logprobs, mask)
    assert same == pytest.approx({**dict.fromkeys(same, 0.0), "rollout/ess": 1.0}, abs=1e-9)
    far = logprobs.clone()
    far[0] -= 2000.0
    metrics = describe_gap(logprobs, far, mask)
    assert metrics["rollout/ess"] == pytest.approx(0.25), "one response has all the weight"
    assert all(map(math.isfinite, metrics.values()))


def test_weights_are_cut_at_the_cap():
    trainer, sampler = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -0.5, -9.0])
    assert_close(rollout_weights(trainer, sampler, 2.0), torch.tensor([1.0, math.exp(-0.5), 2.0]))
    assert_close(rollout_weights(trainer, sampler, 0.0), torch.ones(3))


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return with_sgd(LlamaForCausalLM(config).eval(), 0.1, monkeypatch)


@torch.no_grad()
def sampled(actor: LlamaForCausalLM, sampler: LlamaForCausalLM, temperature: float = 1.0) -> Rollout:
    """Responses of a sampler, scored by the actor in 16 bits, as in training."""
    uniforms = uniforms_for(0, 1, range(ROWS), WIDTH)
    drawn = sample_responses(sampler, PROMPTS, uniforms, temperature, 1.0, 0, 1, synced_gpus=False)
    lengths = drawn.lengths.tolist()
    rows = [p + ids[:n].tolist() for p, ids, n in zip(PROMPTS, drawn.ids, lengths, strict=True)]
    width = max(map(len, rows))
    rollout = rollout_of(
        torch.tensor([row + [1] * (width - len(row)) for row in rows]),
        torch.tensor([len(prompt) for prompt in PROMPTS]), drawn.lengths, drawn.ended,
        logprobs=drawn.logprobs[:, : max(lengths)].float(),
    )  # fmt: skip
    if actor.dtype != torch.float32:
        rollout.logprobs[rollout.response_mask] = policy_pass(actor, rollout.rows(range(ROWS)), 1.0).logprobs
    return rollout


def models_of(actor: LlamaForCausalLM, has_other_sampler: bool = False) -> SimpleNamespace:
    return SimpleNamespace(actor=actor, sampler=None if has_other_sampler else actor, critic=None)


def update(actor: LlamaForCausalLM, rollout: Rollout, advantages: torch.Tensor, **more: object) -> dict:
    fields = {"rollout_batch_size": ROWS, "global_batch_size": ROWS, "ppo_epochs": 1, "micro_batch_size": 2}
    options = PPOOptions(advantage_estimator="rloo", **{**fields, **more})
    metrics = optimise(models_of(actor), rollout, advantages, None, options, KLPenalty(0.0), None, 1)
    return {name: getattr(figure, "value", figure) for name, figure in metrics.items()}


def other_temperature(actor: LlamaForCausalLM) -> Rollout:
    return sampled(actor, actor, temperature=0.7)


def stale_weights(actor: LlamaForCausalLM) -> Rollout:
    old = copy.deepcopy(actor)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in actor.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return sampled(actor, old)


def damaged_cache(actor: LlamaForCausalLM) -> Rollout:
    """The values of all prompt tokens but the last are lost."""

    def lose(_: object, __: object, values: torch.Tensor) -> torch.Tensor | None:
        return values * (torch.arange(values.shape[1]) == values.shape[1] - 1)[:, None]

    hooks = [layer.self_attn.v_proj.register_forward_hook(lose) for layer in actor.model.layers]
    rollout = sampled(copy.deepcopy(actor), actor)
    for hook in hooks:
        hook.remove()
    if actor.dtype != torch.float32:
        with torch.no_grad():
            logprobs = policy_pass(actor, rollout.rows(range(ROWS)), 1.0).logprobs
        rollout.logprobs[rollout.response_mask] = logprobs
    return rollout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampler", [other_temperature, stale_weights, damaged_cache])
def test_a_wrong_sampler_ends_the_run_before_an_update(actor, sampler, dtype):
    rollout = sampler(actor.to(dtype))
    before = copy.deepcopy(actor.state_dict())
    with pytest.raises(SamplerError, match=r"sampler and trainer differ by [\d.]+ nats per token"):
        update(actor, rollout, torch.ones(rollout.logprobs.shape))
    assert_close(actor.state_dict(), before)
    assert update(actor, rollout, torch.ones(rollout.logprobs.shape), max_rollout_gap=9.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_sampler(actor, dtype):
    """The figures are those of the logged log-probabilities, however the rollout is split."""
    rollout = sampled(actor.to(dtype), actor)
    is_rounded = dtype == torch.bfloat16
    metrics = update(actor, rollout, torch.ones(rollout.logprobs.shape), micro_batch_size=1)
    assert metrics["policy/ratio"] == pytest.approx(1, abs=0.02 if is_rounded else 1e-5)
    assert 0 <= metrics["rollout/gap_mean"] < (0.05 if is_rounded else 1e-5)
    assert metrics["rollout/gap_max"] < (0.3 if is_rounded else 1e-4)
    assert metrics["rollout/ess"] == pytest.approx(1, abs=0.1 if is_rounded else 1e-6)
    if is_rounded:
        expected = describe_gap(rollout.logprobs, rollout.behaviour_logprobs, rollout.response_mask)
        assert {name: metrics[name] for name in expected} == expected


def test_fp32_measures_the_first_minibatch_alone(actor):
    """Its rows, before the first update; those of later minibatches have moved."""
    rollout = sampled(actor, actor)
    first = next(module.minibatches(ROWS, 2, 2, PPOOptions().seed, 1))
    rollout.behaviour_logprobs[first[0], 0] -= 0.01
    rollout.behaviour_logprobs[[row for row in range(ROWS) if row not in first]] -= 5.0
    tokens = int(rollout.response_lengths[first].sum())
    fields = {"global_batch_size": 2, "micro_batch_size": 1, "ppo_epochs": 2}
    fields |= {"max_rollout_gap": 1.0, "max_update_kl": 1e9}
    metrics = update(actor, rollout, torch.ones(rollout.logprobs.shape), **fields)
    assert metrics["rollout/gap_mean"] == pytest.approx(0.01 / tokens, rel=1e-2)
    assert metrics["rollout/gap_max"] == pytest.approx(0.01, rel=1e-2)


def test_tokens_are_weighted_by_the_capped_ratio(actor):
    """At the first update pi / pi_old is 1: the loss of a token is minus its weight times its advantage."""
    rollout = sampled(actor, actor)
    mask = rollout.response_mask
    torch.manual_seed(2)
    advantages = torch.randn(mask.shape) * mask
    rollout.behaviour_logprobs[mask] -= torch.randn(int(mask.sum()))
    ratio = (rollout.logprobs - rollout.behaviour_logprobs).exp()
    for cap, weights in ((1.5, ratio.clamp(max=1.5)), (0.0, torch.ones(ratio.shape))):
        trained = copy.deepcopy(actor)
        metrics = update(trained, rollout, advantages, rollout_ratio_cap=cap, max_rollout_gap=9.0)
        expected = -(weights * advantages)[mask].mean().item()
        assert metrics["policy/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_gap_beyond_the_limit(is_known):
    """is_known: at the start, by scoring."""
    lengths = torch.tensor([2, 1])
    rollout = rollout_of(torch.ones(2, 4, dtype=torch.long), lengths, lengths, lengths > 0)
    mask = rollout.response_mask

    def measure(gap: float) -> SamplerGap:
        rollout.logprobs[mask] = gap
        result = SamplerGap(rollout, [0, 1], is_known, 0.02)
        assert bool(result.metrics) is is_known
        result.add([0, 1], rollout.logprobs[mask], is_last=True)
        return result

    assert measure(0.0199).metrics["rollout/gap_mean"] == pytest.approx(0.0199)
    with pytest.raises(
        SamplerError, match=r"--max_rollout_gap 0\.02: sampler and trainer differ by 0\.02 nats"
    ):
        measure(0.0201)


def test_default_limits_and_when_scoring_recomputes(actor):
    options = PPOOptions()
    assert largest_gap(models_of(actor), options) == 1e-3 and not is_rescored(models_of(actor))
    assert is_rescored(models_of(actor, has_other_sampler=True))
    assert largest_gap(models_of(actor.bfloat16()), options) == 0.1 and is_rescored(models_of(actor))
    assert largest_gap(models_of(actor), replace(options, max_rollout_gap=0.02)) == 0.02


@pytest.mark.rare
def test_a_stopped_run_resumes_once_the_sampler_is_right(world, run, tmp_path, monkeypatch):
    """At ZeRO-3, in the second of two micro-batches. Only the iteration of the wrong sampler is lost."""
    uninterrupted, parts = tmp_path / "uninterrupted", tmp_path / "parts"
    more = ["--ptx_data", str(world / "demonstrations.jsonl"), "--ema_decay", "0.5"]
    more += ["--normalise_scores", "sum", "--zero_config", str(ZERO / "zero3.json"), "--eval_fraction", "0"]
    start = run / "sft/final", run / "reward/final"
    succeed("step3_ppo.main", [*ppo(world, *start, uninterrupted, 3), *more], tmp_path, 2)
    generate = sampling.generate

    def damaged(policy, encoder, prompts, rows, options, step, title):
        options = replace(options, temperature=0.5 if step == 2 else 1.0)
        return generate(policy, encoder, prompts, rows, options, step, title)

    command = [*ppo(world, *start, parts, 3), *more]
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "generate", damaged)
        failed = run_stage("step3_ppo.main", command, tmp_path, 2)
    assert failed.codes == [2, 2], failed.output
    (line,) = [line for line in failed.output.splitlines() if line.startswith("error:")]
    assert line.startswith("error: --max_rollout_gap 0.001: sampler and trainer differ by ")
    assert line.endswith("a damaged cache; the same command resumes after step 1")
    assert (parts / "checkpoints/step_000001/manifest.json").exists()
    succeed("step3_ppo.main", command, tmp_path, 2)
    assert_same_end(uninterrupted, parts)
