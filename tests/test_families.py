"""Every supported family of causal language models goes through all three stages."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.ranks import succeed
from tests.test_stages import LORA, metrics, ppo, reward, sft, world  # noqa: F401 - world is a fixture

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, final_logit_softcapping=3.0),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=32, dropout=0.5, init_std=0.2,
    ),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.5, initializer_range=0.2
    ),
    "pythia": GPTNeoXConfig(**SHAPE),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_through_all_stages(world: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Generation and update give one log-probability (ratio 1), KL starts at 0, and the folders load.

    A wrong position id, mask or dropout that stays on shows in the ratio.
    """
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    config = FAMILIES[name]
    config.vocab_size = len(tokenizer)
    for token in ("bos", "eos", "pad"):
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    torch.manual_seed(0)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for file in world.glob("*.jsonl"):
        (tmp_path / file.name).symlink_to(file)
    succeed("step1_sft.main", sft(tmp_path, tmp_path / "sft", steps=2), tmp_path)
    succeed(
        "step2_reward.main", reward(tmp_path, tmp_path / "sft/final", tmp_path / "reward", steps=2), tmp_path
    )
    adapters = LORA if name in ("gpt2", "opt") else []
    start = tmp_path / "sft/final", tmp_path / "reward/final"
    succeed("step3_ppo.main", [*ppo(tmp_path, *start, tmp_path / "ppo", steps=2), *adapters], tmp_path)
    assert metrics(tmp_path / "ppo", "policy/ratio") == pytest.approx([1.0, 1.0], abs=1e-5)
    assert metrics(tmp_path / "ppo", "kl/mean")[0] == pytest.approx(0.0, abs=2e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ppo/final").config.model_type == config.model_type
    for folder in (start[1], tmp_path / "ppo/final_critic"):
        assert AutoModelForSequenceClassification.from_pretrained(folder).num_labels == 1


def test_a_new_pad_token_grows_the_embeddings_alike(world: Path, tmp_path: Path) -> None:  # noqa: F811
    """A tokenizer whose only special token is EOS gets a pad token, and every stage a row for it."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    spec = json.loads((world / "model/tokenizer_config.json").read_text())
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    for name in ("pad_token", "unk_token", "bos_token"):
        spec.pop(name, None)
    (model / "tokenizer_config.json").write_text(json.dumps(spec | {"pad_token": spec["eos_token"]}))
    torch.manual_seed(0)
    config = LlamaConfig(**GROUPED, vocab_size=len(tokenizer), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    for file in world.glob("*.jsonl"):
        (tmp_path / file.name).symlink_to(file)
    succeed("step1_sft.main", [*sft(tmp_path, tmp_path / "sft", steps=1), *LORA], tmp_path)
    succeed(
        "step2_reward.main", reward(tmp_path, tmp_path / "sft/final", tmp_path / "reward", steps=1), tmp_path
    )
    for stage in ("sft", "reward"):
        saved = AutoTokenizer.from_pretrained(tmp_path / stage / "final")
        rows = json.loads((tmp_path / stage / "final/config.json").read_text())["vocab_size"]
        assert saved.pad_token_id != saved.eos_token_id and saved.pad_token_id < rows
