"""All steps on a base in 4 bits: what they share, what they write, and that the base stays."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import step1_sft.main
from common.model.engine import make_engine
from common.model.engine_protocol import Engine
from common.model.nf4 import NF4Linear
from common.training.export import export_model
from tests.conftest import REPOSITORY
from tests.end_to_end.test_resume import zero_config
from tests.ranks import run_stage
from tests.stages import CLOSE, LORA, QLORA, ZERO, metrics, ppo, reward, sft

pytest.importorskip("bitsandbytes", reason="needs common/model/requirements-qlora.txt")
QUANTISED = re.compile(r"^(\d+) linear layers are in 4 bits", re.MULTILINE)
LAYERS = 2 * 7  # of the tiny model


def finish(module: str, words: list[str], folder: Path, ranks: int = 1) -> str:
    result = run_stage(module, words, folder, ranks)
    assert result.codes == [0] * ranks, result.output
    return result.output


@pytest.fixture(scope="module")
def qlora_run(world: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages with adapters on 4 bits, each from the same start as `run`; NAME.log: their output."""
    folder, start = tmp_path_factory.mktemp("qlora"), (run / "sft/final", run / "reward/final")
    for name, module, words in (
        ("sft", "step1_sft.main", sft(world, folder / "sft")),
        ("reward", "step2_reward.main", reward(world, start[0], folder / "reward")),
        ("ppo", "step3_ppo.main", ppo(world, *start, folder / "ppo")),
    ):
        (folder / f"{name}.log").write_text(finish(module, [*words, *QLORA], folder))
    return folder


def test_final_is_what_transformers_and_peft_compute(world: Path, run: Path, qlora_run: Path) -> None:
    """They quantise the base themselves and add final/adapter/ to each product. final/ is a plain folder."""
    ids, settings = torch.arange(4, 20)[None], BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    for stage, auto, base, options in (
        ("sft", AutoModelForCausalLM, world / "model", {}),
        ("reward", AutoModelForSequenceClassification, run / "sft/final", {"num_labels": 1}),
    ):
        final = qlora_run / stage / "final"
        packed = auto.from_pretrained(base, quantization_config=settings, **options)
        expected = PeftModel.from_pretrained(packed, final / "adapter")
        expected.train()  # else bitsandbytes packs the weights for kernels of its own, in bf16
        torch.testing.assert_close(
            auto.from_pretrained(final)(ids).logits, expected(ids).logits.float(), rtol=1e-4, atol=1e-4
        )
        weights = load_file(final / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert "quantization_config" not in (final / "config.json").read_text()


def test_the_base_is_quantised_once_per_engine(qlora_run: Path) -> None:
    """In step 3 twice: the actor is the reference too, and the critic the reward model."""
    for name, copies in (("sft", 1), ("reward", 1), ("ppo", 2)):
        counts = QUANTISED.findall((qlora_run / f"{name}.log").read_text())
        assert counts == [str(LAYERS)] * copies


def test_the_reference_is_the_base_in_4_bits(qlora_run: Path) -> None:
    """KL 0 before the first update, samples from merged copies included; ratio 1 in every iteration."""
    kl = metrics(qlora_run / "ppo", "kl/mean")
    assert kl[0] == pytest.approx(0.0, abs=1e-4) and abs(kl[-1]) > 1e-3
    assert metrics(qlora_run / "ppo", "policy/ratio") == pytest.approx([1.0] * 5, abs=1e-5)
    assert max(metrics(qlora_run / "ppo", "rollout/gap_mean")) < 1e-5


def test_the_base_is_rounded(lora_run: Path, qlora_run: Path) -> None:
    for stage in ("sft", "reward"):
        fine, coarse = (metrics(folder / stage, "train/loss") for folder in (lora_run, qlora_run))
        assert fine[0] != pytest.approx(coarse[0], **CLOSE)


@pytest.mark.parametrize(
    ("zero", "precision"),
    [(1, "bf16"), *(pytest.param(*one, marks=pytest.mark.rare) for one in ((0, "fp32"), (2, "bf16")))],
)
def test_training_leaves_the_base(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: int, precision: str
) -> None:
    """To the bit, from before DeepSpeed casts the model to the end. Adapters move."""

    def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        base = {n: m.dequantised(torch.float32) for n, m in model.named_modules() if isinstance(m, NF4Linear)}
        return base | {n: p.detach().float() for n, p in model.named_parameters() if "lora_B" in n}

    def make(model: torch.nn.Module, *parts: object) -> object:
        torch.save(weights(model), tmp_path / "before.pt")
        return make_engine(model, *parts)

    def export(engine: Engine, *parts: object) -> None:
        torch.save(weights(engine.module), tmp_path / "after.pt")
        export_model(engine, *parts)

    monkeypatch.setattr(step1_sft.main, "make_engine", make)
    monkeypatch.setattr(step1_sft.main, "export_model", export)
    words = [*sft(world, tmp_path / "out", 2), *QLORA, *zero_config(tmp_path, zero, precision)]
    finish("step1_sft.main", words, tmp_path)
    before, after = (torch.load(tmp_path / f"{name}.pt") for name in ("before", "after"))
    assert before.keys() == after.keys() and len(before) == 2 * LAYERS
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == ("lora_B" not in name), name
    exported = load_file(tmp_path / "out/final/model.safetensors")
    assert {str(weight.dtype) for weight in exported.values()} == {
        "torch.bfloat16" if precision == "bf16" else "torch.float32"
    }


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        ("reward", 1),
        *(
            pytest.param(stage, zero, marks=pytest.mark.rare)
            for stage in ("sft", "reward", "ppo")
            for zero in (0, 1, 2)
        ),
    ],
)
def test_two_ranks_train_like_one(
    world: Path, run: Path, qlora_run: Path, tmp_path: Path, stage: str, zero: int
) -> None:
    start = run / "sft/final", run / "reward/final"
    module, words = {
        "sft": ("step1_sft.main", sft(world, tmp_path / "out")),
        "reward": ("step2_reward.main", reward(world, start[0], tmp_path / "out")),
        "ppo": ("step3_ppo.main", ppo(world, *start, tmp_path / "out")),
    }[stage]
    finish(module, [*words, *QLORA, "--zero_config", str(ZERO / f"zero{zero}.json")], tmp_path, ranks=2)
    name = "reward/mean" if stage == "ppo" else "train/loss"
    assert metrics(tmp_path / "out", name) == pytest.approx(metrics(qlora_run / stage, name), **CLOSE)


def test_direct_has_the_reference_in_4_bits(world: Path, run: Path, tmp_path: Path) -> None:
    """Not the cached one of the same model in full precision: before training the margin is 0."""
    single = [*QLORA, "--double_quantisation", "False"]
    for name, extra in {"lora": LORA, "qlora": QLORA, "again": QLORA, "single": single}.items():
        words = [*reward(world, run / "sft/final", tmp_path / name, 2), *extra]
        words += ["--cache_dir", str(tmp_path / "cache")]
        output = finish("step2_reward.direct.main", words, tmp_path)
        assert ("are in the cache" in output) == (name == "again")
        assert metrics(tmp_path / name, "eval/margin")[0] == pytest.approx(0.0, abs=1e-6)
    assert len(list((tmp_path / "cache").glob("reference_*.npy"))) == 3 * 2  # training and held-out data


def test_the_launch_script_starts_it(world: Path, tmp_path: Path) -> None:
    script = str(REPOSITORY / "launch/step1_sft.sh")
    words = ["bash", script, *sft(world, tmp_path / "out", 1), *QLORA]
    done = subprocess.run(
        words, env=os.environ | {"NUM_GPUS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert QUANTISED.findall(done.stdout) == [str(LAYERS)]
    assert (tmp_path / "out/final/adapter/adapter_model.safetensors").exists()
