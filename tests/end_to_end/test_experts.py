"""Mixtures of experts: ranks, micro-batches and ZeRO stages change nothing, and all weights are trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, Qwen3MoeConfig

from tests.end_to_end.test_families import EXPERTS, GROUPED, HEADS, make_model
from tests.ranks import succeed
from tests.stages import CLOSE, ZERO, metrics, ppo, reward, sft

BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
CONFIGS = {
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, **BALANCED),
    "qwen3_moe": Qwen3MoeConfig(**HEADS, **EXPERTS, **BALANCED),
}
# A large rate, at which every weight with a gradient moves; with this epsilon rounding does not.
STRONG = ["--adam_epsilon", "1e-3", "--warmup_ratio", "0"]
ONE = ["--micro_batch_size", "8"]  # the global batch at once
PARTS = ["--micro_batch_size", "2", "--zero_config", str(ZERO / "zero3.json")]
ROUTER = ["router/max_load", "router/entropy", "router/unused", "train/aux_loss"]


@pytest.fixture(scope="module", params=["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.rare)])
def mixture(world: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_model(world, folder, CONFIGS[request.param])
    return folder


def compare(
    folder: Path, module: str, words: list[str], start: Path, losses: list[str], exports: str
) -> None:
    """Run a stage on one rank with one micro-batch, and on two with several at ZeRO-3."""
    outputs = [folder / f"{exports}_{ranks}" for ranks in (1, 2)]
    for ranks, extra, output in ((1, ONE, outputs[0]), (2, PARTS, outputs[1])):
        succeed(
            module,
            [*words, *STRONG, *extra, "--max_eval_samples", "4", "--output_dir", str(output)],
            folder,
            ranks,
        )
    for name in (*losses, *ROUTER):
        values, expected = (metrics(output, name) for output in reversed(outputs))
        assert values and values == pytest.approx(expected, **CLOSE), name
    before = load_file(start / "model.safetensors")
    one, two = (load_file(output / "final/model.safetensors") for output in outputs)
    for name in two:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    assert not [name for name in two if name in before and torch.equal(two[name], before[name])]


def test_sft(mixture: Path) -> None:
    words = [*sft(mixture, mixture / "unused", 2), "--learning_rate", "1e-2"]
    compare(mixture, "step1_sft.main", words, mixture / "model", ["train/loss", "train/grad_norm"], "sft")


def test_reward_model(mixture: Path) -> None:
    words = [*reward(mixture, mixture / "model", mixture / "unused", 2), "--learning_rate", "1e-2"]
    words += ["--max_centre_samples", "8"]
    names = ["train/loss", "train/grad_norm"]
    compare(mixture, "step2_reward.main", words, mixture / "model", names, "reward")


def test_direct(mixture: Path) -> None:
    words = [*reward(mixture, mixture / "model", mixture / "unused", 2), "--learning_rate", "1e-2"]
    names = ["train/loss", "reward/margin", "train/grad_norm"]
    compare(mixture, "step2_reward.direct.main", words, mixture / "model", names, "direct")


def test_ppo(mixture: Path) -> None:
    """The critic starts as the reward model, with its own load-balancing loss."""
    scorer = [*reward(mixture, mixture / "model", mixture / "scorer", 1), "--max_centre_samples", "8"]
    succeed("step2_reward.main", scorer, mixture)
    words = ppo(mixture, mixture / "model", mixture / "scorer/final", mixture / "unused", 1)
    words += ["--actor_learning_rate", "1e-2", "--critic_learning_rate", "1e-2", "--ppo_epochs", "1"]
    words += ["--max_response_length", "4"]
    names = ["policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm", "kl/mean"]
    compare(mixture, "step3_ppo.main", words, mixture / "model", names, "ppo")
