"""Checkpoints of DeepSpeed-Chat, TRL and OpenRLHF, and the conversion on the page for those who have some."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from common.model.loading import load_scalar_model
from common.model.roles import check_scalar_model, policy_config
from common.runtime.options import UserError
from common.text.tokenizer import load_tokenizer
from tests.conftest import REPOSITORY, assert_close

PAGE = (REPOSITORY / ".github/COMING_FROM.md").read_text(encoding="utf-8")
CODE = re.search(r"THEIRS BASE OURS <<'END'\n(.*?)^END$", PAGE, re.M | re.S)[1]
IDS = torch.tensor([[5, 9, 7, 4]])


@pytest.fixture(params=["llama", "opt"])
def base(request: pytest.FixtureRequest, world: Path, tmp_path: Path) -> Path:
    """A language model with its tokenizer."""
    if request.param == "llama":
        return world / "model"
    tokenizer = load_tokenizer(str(world / "model"))
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


def reward_model(base: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A backbone, a linear head of weight (1, D), and the score of IDS by them."""
    backbone = AutoModel.from_pretrained(base)
    with torch.no_grad():
        hidden = backbone(IDS).last_hidden_state[0, -1]  # (D,)
        head = torch.randn(1, len(hidden), generator=torch.Generator().manual_seed(0))
        return backbone, head, head @ hidden


def convert(theirs: Path, base: Path, ours: Path, patch: pytest.MonkeyPatch) -> nn.Module:
    patch.setattr(sys, "argv", ["-", str(theirs), str(base), str(ours)])
    exec(compile(CODE, "COMING_FROM.md", "exec"), {})
    check_scalar_model(str(ours), "reward_model_name_or_path")
    return load_scalar_model(str(ours), load_tokenizer(str(ours)), None)


def score(model: nn.Module) -> Tensor:
    model.config.pad_token_id = None
    with torch.no_grad():
        return model(IDS).logits[0]


@pytest.mark.parametrize("name", ["rwtransformer", "rwtranrsformer"])
def test_a_reward_model_of_deepspeed_chat(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A pickled state dict, the config of the language model, no tokenizer but its vocabulary."""
    backbone, head, expected = reward_model(base)
    theirs = tmp_path / "critic"
    theirs.mkdir()
    state = {f"{name}.{key}": value for key, value in backbone.state_dict().items()}
    torch.save({"v_head.weight": head, **state}, theirs / "pytorch_model.bin")
    (theirs / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(UserError, match="not a reward model"):
        check_scalar_model(str(theirs), "reward_model_name_or_path")
    assert_close(score(convert(theirs, base, tmp_path / "ours", monkeypatch)), expected)


@pytest.mark.parametrize("name", ["score", "value_head"])
def test_a_reward_model_of_openrlhf(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Safetensors of a class of its own, in 16 bits; mean and std of the rewards in the config."""
    backbone, head, expected = reward_model(base)
    theirs = tmp_path / "rm"
    backbone.config.update({"architectures": ["RewardModel"], "mean": 0.5, "std": 2.0})
    backbone.config.save_pretrained(theirs)
    prefix = {"llama": "model", "opt": "model"}[backbone.config.model_type]
    state = {f"{prefix}.{key}": value.bfloat16() for key, value in backbone.state_dict().items()}
    save_file({f"{name}.weight": head.bfloat16(), **state}, theirs / "model.safetensors")
    model = convert(theirs, base, tmp_path / "ours", monkeypatch)
    assert (model.config.reward_mean, model.config.reward_std) == (0.5, 2.0)
    assert score(model).item() == pytest.approx(expected.item(), rel=0.05, abs=0.05)
    assert {value.dtype for value in load_file(tmp_path / "ours/model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_policy_with_a_value_head_of_trl(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), **head})
    policy_config(str(tmp_path), "actor_model_name_or_path")
    assert "ignored 2 weights that the model does not use: v_head.summary.bias" in capsys.readouterr().out
