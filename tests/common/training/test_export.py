"""Exported folders, and failed exports."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common.generation.generate import PlainEngine
from common.runtime import files
from common.runtime.options import UserError
from common.training.export import export_best, export_model
from tests.ranks import succeed
from tests.stages import LORA, sft


@pytest.fixture
def engine() -> PlainEngine:
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    return PlainEngine(LlamaForCausalLM(config))


def tokenizer(error: Exception | None = None) -> SimpleNamespace:
    """A tokenizer that saves nothing, or raises."""

    def save(_: Path) -> None:
        if error:
            raise error

    return SimpleNamespace(save_pretrained=save)


@pytest.mark.parametrize("error", [KeyError("merges"), ValueError("a\nb"), TypeError(), OSError("disk")])
def test_a_failed_export_is_one_line_and_keeps_the_old_folder(
    engine: PlainEngine, tmp_path: Path, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    folder = tmp_path / "final"
    export_model(engine, tokenizer(), folder, None)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError) as refused:
        export_model(engine, tokenizer(error), folder, None)
    assert f"{folder}: not written: " in str(refused.value) and "--export_only" in str(refused.value)
    assert "\n" not in str(refused.value)
    export_best(engine, tokenizer(error), folder, None)
    assert "not written" in capsys.readouterr().out.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_an_export_is_readable_for_other_users(
    engine: PlainEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also files that a library creates with owner permissions only."""
    monkeypatch.setattr(files, "UMASK", 0o022)
    private = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.json").touch(0o600))
    export_model(engine, private, tmp_path / "final", None)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "final").iterdir()}
    assert "tokenizer.json" in modes and set(modes.values()) == {0o644}


@pytest.mark.parametrize("extra", [[], LORA], ids=["full", "lora"])
def test_an_invalid_generation_config_does_not_end_a_run(
    world: Path, tmp_path: Path, extra: list[str]
) -> None:  # fmt: skip
    start = tmp_path / "model"
    shutil.copytree(world / "model", start)
    (start / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "top_k": 5, "top_p": 0.9}))
    words = [
        *sft(world, tmp_path / "out", 1),
        "--model_name_or_path",
        str(start),
        "--best_metric",
        "eval/loss",
    ]
    succeed("step1_sft.main", [*words, *extra], tmp_path)
    for name in ("best", "final"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        written = json.loads((tmp_path / "out" / name / "generation_config.json").read_text())
        assert "eos_token_id" in written and not {"top_k", "top_p"} & written.keys()
