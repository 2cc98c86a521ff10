"""A step of each stage on a GPU, pretended where there is none: no CPU tensor meets a GPU tensor."""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import step1_sft.main
import step2_reward.direct.objective
import step2_reward.main
from common.generation.generate import PlainEngine
from common.model import head
from common.model.ema import update_ema_weights
from common.model.reward_ensemble import RewardModel
from common.text.prompts import Prompt
from common.text.tokenizer import SegmentEncoder
from common.training.means import Mean, step_values
from step1_sft.data import Demonstration
from step1_sft.options import SFTOptions
from step2_reward.data import Layout, Preference
from step2_reward.direct.data import Choice
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.reference import ReferencedExamples
from step2_reward.options import RewardOptions
from step3_ppo import optimise
from step3_ppo.metrics import rollout_metrics, speed
from step3_ppo.models import Scorer
from step3_ppo.objectives import comparable_scores
from step3_ppo.options import PPOOptions
from step3_ppo.returns import estimate_advantages, shape_rewards
from step3_ppo.rollout import sample_rollout
from step3_ppo.scoring import score_rollout
from step3_ppo.state import PPOState
from tests.byte_encoder import byte_encoder
from tests.pretend_gpu import GPUTensor, on_gpu, pretended_gpu

TEXTS = ["One tree", "A", "Two birds sing", "It rains"]
Move = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module")
def encoder() -> SegmentEncoder:
    return byte_encoder("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head works in several chunks, and nothing is updated: autograd needs a build for CUDA."""
    monkeypatch.setattr(head, "CHUNK", 5 * 300)
    for module in (step1_sft.main, step2_reward.main, step2_reward.direct.objective, optimise):
        monkeypatch.setattr(module, "backward_and_step", no_update)


def no_update(engine: nn.Module, loss: torch.Tensor, ranks: int, is_last: bool) -> float | None:  # noqa: ARG001 - as the engine's
    return 1.0 if is_last else None


def model(kind: type[nn.Module], encoder: SegmentEncoder, seed: int, move: Move) -> PlainEngine:
    """A tiny model with large logits, so that responses differ."""
    torch.manual_seed(seed)
    rows = len(encoder.tokenizer) + 3
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=encoder.pad_token_id, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    inner = kind(config).requires_grad_(False)
    inner.num_tokens, inner.end_ids = rows - 3, [encoder.eos_token_id, *range(200, 230)]
    engine = PlainEngine(move(inner))
    engine.get_lr, engine.lr_scheduler = lambda: [1.0], SimpleNamespace(step=lambda: None)
    return engine


def compare(step: Callable[[Move], dict[str, Any]]) -> None:
    """The numbers of a step are the same on both devices.

    But for the useful share: on a GPU, the sampler looks less often at which rows have ended.
    """
    with torch.no_grad():
        expected = step(lambda inner: inner)
    with pretended_gpu():
        numbers = step(on_gpu)
    for name, value in expected.items():
        value, number = (one.value if isinstance(one, Mean) else one for one in (value, numbers[name]))
        if not name.startswith(("time/", "memory/", "rollout/useful_share")) and "per_second" not in name:
            assert float(number) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def ppo_step(move: Move, encoder: SegmentEncoder, **more: Any) -> dict[str, Any]:
    """Rollout, scoring, rewards, advantages, losses, metrics, controllers and EMA weights."""
    options = PPOOptions(
        rollout_batch_size=8, global_batch_size=4, micro_batch_size=2, generation_batch_size=3, ppo_epochs=2,
        max_response_length=9, normalise_scores="each", kl_controller="adaptive", entropy_coef=0.1, seed=1,
        **more,
    )  # fmt: skip
    policies = [model(LlamaForCausalLM, encoder, seed, move) for seed in (0, 1)]
    scalars = [model(LlamaForSequenceClassification, encoder, seed, move) for seed in (2, 3)]
    members = [RewardModel(encoder, partial(contextlib.nullcontext, scalars[0].module))]
    models = SimpleNamespace(
        actor=policies[0], sampler=policies[0], critic=scalars[1] if options.has_critic else None,
        scorer=Scorer(members, [], options), judges={}, encoder=encoder,
        reference_model=lambda: contextlib.nullcontext(policies[1]),
    )  # fmt: skip
    prompts = [
        Prompt(encoder.tokenizer(text).input_ids, json.dumps({"prompt": text}))
        for text in TEXTS
        for _ in range(2)
    ]
    state = PPOState.load(options, {})
    rollout = sample_rollout(models.sampler, encoder, prompts, options, step=1)
    rollout = score_rollout(models, prompts, rollout, options)
    rollout = comparable_scores(rollout, models.scorer, options, state)
    rewards, metrics = shape_rewards(rollout, models.scorer, options, state)
    advantages, returns = estimate_advantages(rollout, rewards, options, state)
    metrics |= optimise.optimise(models, rollout, advantages, returns, options, state.kl, None, 1)
    metrics |= rollout_metrics(models, rollout, returns) | speed(rollout, [1.0, 1.0, 1.0], 4, options)
    state.adapt(options, 1, step_values(metrics))
    average: dict[str, torch.Tensor] = {}
    for _ in range(2):
        update_ema_weights(average, policies[0], 0.9)
    assert not any(isinstance(weight, GPUTensor) for weight in average.values()), "in host memory"
    return {**metrics, **state.plain(), "average": sum(weight.sum() for weight in average.values())}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"advantage_estimator": "rloo", "samples_per_prompt": 2, "top_p": 0.8, "temperature": 0.7},
        {
            "advantage_estimator": "reinforce", "reinforce_baseline": "moving", "top_k": 20,
            "policy_loss": "gspo", "kl_penalty": "k3", "whiten_rewards": True, "overlong_buffer": 3,
            "repetition_penalty": 0.5, "mask_truncated": True,
        },
    ],
    ids=["gae", "rloo", "reinforce"],
)  # fmt: skip
def test_ppo_on_a_gpu(encoder: SegmentEncoder, more: dict[str, Any]) -> None:
    compare(partial(ppo_step, encoder=encoder, **more))


def test_fine_tuning_on_a_gpu(encoder: SegmentEncoder) -> None:
    rows = [encoder.tokenizer(text).input_ids for text in TEXTS]
    batch = [Demonstration(ids, [False] + [True] * (len(ids) - 1)) for ids in rows]

    def step(move: Move, packing: bool) -> dict[str, Any]:
        options = SFTOptions(global_batch_size=4, micro_batch_size=2, packing=packing, max_length=32)
        return step1_sft.main.train_step(model(LlamaForCausalLM, encoder, 0, move), batch, options)

    for packing in (False, True):
        compare(partial(step, packing=packing))


@pytest.mark.parametrize("shares", [False, True])
def test_reward_model_on_a_gpu(encoder: SegmentEncoder, shares: bool) -> None:
    prompt, *rows = (encoder.tokenizer(text).input_ids for text in TEXTS)
    records = [
        Preference(prompt, rows[0] + rows[1], [len(rows[0]), len(rows[1])], ranks)
        for ranks in ([0, 1], [0, 0])
    ]
    records.append(Preference(prompt, sum(rows, []), [*map(len, rows)], [0, 1, 2]))
    options = RewardOptions(global_batch_size=3, micro_batch_size=2, centre_coef=0.1)

    def step(move: Move) -> dict[str, Any]:
        engine = model(LlamaForSequenceClassification, encoder, 0, move)
        return step2_reward.main.train_step(
            engine, records, options, Layout(encoder.pad_token_id, shares), None
        )

    compare(step)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "kto", "aot", "length and weights"])
def test_direct_losses_on_a_gpu(encoder: SegmentEncoder, loss: str) -> None:
    rows = [encoder.tokenizer(text).input_ids for text in TEXTS]
    kind = {"loss": "ipo", "ld_alpha": 0.5, "wpo": True} if loss == "length and weights" else {"loss": loss}
    options = DirectOptions(**kind, global_batch_size=3, micro_batch_size=2)
    options.check()
    pair = Choice(rows[0] + rows[2], [len(rows[0]), len(rows[2])], [3, 3], [0.0, 1.0])
    single = Choice(rows[3], [len(rows[3])], [2], [0.0])
    examples = ReferencedExamples(
        [pair] * 3 if options.is_paired else [single, single._replace(ranks=[1.0])], options
    )

    def step(move: Move) -> dict[str, Any]:
        engine = model(LlamaForCausalLM, encoder, 0, move)
        return step2_reward.direct.objective.batch_metrics(engine, [*examples], options, train=True)[0]

    compare(step)


def test_logits_of_16_bits_on_a_gpu() -> None:
    """They are fp32, as on the CPU, where other code computes them."""
    linear, states = nn.Linear(16, 300, dtype=torch.bfloat16), torch.randn(12, 16, dtype=torch.bfloat16)
    expected = head.in_chunks(linear.requires_grad_(False), states, head.Targets(torch.arange(12)))
    with pretended_gpu():
        targets = head.Targets(GPUTensor(torch.arange(12)))
        result = head.in_chunks(on_gpu(linear), GPUTensor(states), targets)
    assert result.dtype == torch.float32 and result.device.type == "cuda"
    assert torch.allclose(result.cpu(), expected, rtol=1e-5)


def test_a_tensor_on_the_wrong_device_is_noticed() -> None:
    """What CUDA refuses, and what it allows."""
    with pretended_gpu():
        ours, other = torch.ones(3, device="cuda:0"), torch.ones(3)
        for wrong in (
            lambda: ours + other,
            lambda: torch.stack([ours.sum(), other.sum()]),
            lambda: other[torch.tensor([0], device="cuda:0")],
            lambda: other.sum().add_(ours.sum()),
        ):
            with pytest.raises(RuntimeError, match="a CPU tensor of shape .* meets a GPU tensor"):
                wrong()
        assert (ours + other.sum())[torch.tensor([1, 2])].tolist() == [4.0, 4.0]
        assert other.to("cuda:0").add_(ours).cpu().equal(2 * other)
        assert ours.sum().item() == 3 and ours.device.type == "cuda" and other.device.type == "cpu"
