"""Families of causal language models: supported stages, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RwkvConfig,
    SiglipVisionConfig,
)

from common.model.families import check_policy, check_sampling, check_scalar
from common.runtime.options import UserError
from tests.ranks import run_stage, succeed
from tests.stages import (
    LORA,
    ZERO,
    metrics,
    ppo,
    reward,
    sft,
)

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

# A policy, a reward model and a critic can be made of these.
COMPLETE: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**HEADS),
    "qwen2": Qwen2Config(**HEADS),
    "qwen3": Qwen3Config(**HEADS),
    "qwen3_moe": Qwen3MoeConfig(**HEADS, **EXPERTS),
    "qwen3_next": Qwen3NextConfig(
        **HEADS, **EXPERTS, **LINEAR, shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mistral": MistralConfig(**HEADS, sliding_window=8),
    "mixtral": MixtralConfig(
        **GROUPED, num_local_experts=4, router_jitter_noise=0.5, output_router_logits=True
    ),
    "gemma": GemmaConfig(**HEADS),
    "gemma2": Gemma2Config(**HEADS, final_logit_softcapping=3.0),
    "gemma3_text": Gemma3TextConfig(**HEADS, sliding_window=8),
    "gemma3": Gemma3Config(
        text_config=Gemma3TextConfig(**HEADS, sliding_window=8, attention_dropout=0.5),
        vision_config=SiglipVisionConfig(**VISION), mm_tokens_per_image=4,
    ),
    "phi3": Phi3Config(**GROUPED),
    "falcon": FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    ),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=32, dropout=0.5, init_std=0.2,
    ),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.5, initializer_range=0.2
    ),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "olmo2": Olmo2Config(**GROUPED),
}  # fmt: skip
# transformers has no sequence classifier of these: no reward model, no critic.
POLICIES: dict[str, PretrainedConfig] = {
    "cohere": CohereConfig(**GROUPED),
    "mamba": MambaConfig(
        hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4, initializer_range=0.2
    ),
}  # fmt: skip


def make_model(world: Path, folder: Path, config: PretrainedConfig) -> Path:
    """A random model with the tokenizer of the world, fewer tokens than rows, and its data beside it."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    text = config.get_text_config()
    text.vocab_size = len(tokenizer) + 8
    for token in ("bos", "eos", "pad"):
        setattr(text, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    if text is not config:
        config.image_token_id = len(tokenizer) - 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for file in world.glob("*.jsonl"):
        (folder / file.name).symlink_to(file)
    return folder / "model"


@pytest.mark.parametrize("name", COMPLETE)
def test_family_in_all_stages(world: Path, tmp_path: Path, name: str) -> None:
    """Generation and update give one log-probability (ratio 1), KL starts at 0, and the folders load.

    A wrong position id, mask, or noise that stays on shows in the ratio.
    """
    config = COMPLETE[name]
    make_model(world, tmp_path, config)
    succeed("step1_sft.main", sft(tmp_path, tmp_path / "sft", steps=1), tmp_path)
    start = tmp_path / "sft/final", tmp_path / "reward/final"
    succeed("step2_reward.main", reward(tmp_path, start[0], tmp_path / "reward", steps=1), tmp_path)
    adapters = LORA if name in ("gpt2", "opt", "gemma3") else []
    succeed("step3_ppo.main", [*ppo(tmp_path, *start, tmp_path / "ppo", steps=1), *adapters], tmp_path)
    check_first_step(tmp_path / "ppo")
    if name == "mixtral":  # its configuration asks for the load-balancing loss
        assert all(metrics(tmp_path / stage, "train/aux_loss")[0] > 0 for stage in ("sft", "ppo"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ppo/final").config.model_type == config.model_type
    for folder in (start[1], tmp_path / "ppo/final_critic"):
        assert AutoModelForSequenceClassification.from_pretrained(folder).num_labels == 1


def check_first_step(output: Path) -> None:
    assert metrics(output, "policy/ratio") == pytest.approx([1.0], abs=1e-5)
    assert metrics(output, "kl/mean") == pytest.approx([0.0], abs=2e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_family_without_classifier_is_a_policy(world: Path, tmp_path: Path, name: str) -> None:
    """Steps 1 and 3 work; step 2, and a critic from the actor's model, are refused in one line."""
    model = make_model(world, tmp_path, POLICIES[name])
    (tmp_path / "score.py").write_text(
        "def length(prompts, responses, records):\n    return [*map(len, responses)]"
    )
    succeed("step1_sft.main", sft(tmp_path, tmp_path / "sft", steps=1), tmp_path)
    rollouts = ppo(tmp_path, model, model, tmp_path / "ppo", steps=1)
    place = rollouts.index("--reward_model_name_or_path")
    rollouts[place : place + 2] = "--reward_function", f"{tmp_path}/score.py:length"
    by_group = ["--advantage_estimator", "rloo", "--samples_per_prompt", "2"]
    succeed("step3_ppo.main", [*rollouts, *by_group], tmp_path)
    check_first_step(tmp_path / "ppo")
    for module, options in (
        ("step2_reward.main", reward(tmp_path, model, tmp_path / "reward", steps=1)),
        ("step3_ppo.main", [*rollouts, "--output_dir", str(tmp_path / "gae")]),
    ):
        refused = run_stage(module, options, tmp_path)
        assert refused.codes == [2] and refused.output.count("\n") == 1
        assert str(model) in refused.output and f"model type '{name}'" in refused.output


def test_unsupported_families_are_refused() -> None:
    """From the configuration only; there are no weights."""
    for check, config in (
        (check_sampling, RwkvConfig(hidden_size=32, num_hidden_layers=2)),
        (check_sampling, AutoConfig.for_model("recurrent_gemma")),
        (check_scalar, AutoConfig.for_model("ctrl", n_embd=32, dff=32, n_layer=1, n_head=2)),
        (check_policy, AutoConfig.for_model("bert")),
        (check_scalar, AutoConfig.for_model("bert")),
        (check_policy, AutoConfig.for_model("t5")),
        (check_scalar, AutoConfig.for_model("t5")),
    ):
        config.name_or_path = "a/model"
        with pytest.raises(UserError, match=f"^a/model: .*({config.model_type}|ForSequenceClassification)"):
            check(config)
    check_policy(RwkvConfig())


def test_new_pad_token_grows_the_embeddings(world: Path, tmp_path: Path) -> None:
    """A tokenizer with EOS as its only special token gets a pad token, and every stage a row for it."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    spec = json.loads((world / "model/tokenizer_config.json").read_text())
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    for name in ("pad_token", "unk_token", "bos_token"):
        spec.pop(name, None)
    (model / "tokenizer_config.json").write_text(json.dumps(spec | {"pad_token": spec["eos_token"]}))
    torch.manual_seed(0)
    config = LlamaConfig(**HEADS, vocab_size=len(tokenizer), tie_word_embeddings=True)
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
        weights = load_file(tmp_path / stage / "final/model.safetensors")
        assert [len(weights[name]) for name in weights if "embed_tokens" in name] == [rows] and rows % 64 == 0
    words = ppo(tmp_path, model, tmp_path / "reward/final", tmp_path / "ppo", steps=1)
    words += ["--eval_fraction", "0", "--zero_config", str(ZERO / "zero3.json")]
    succeed("step3_ppo.main", words, tmp_path)
    assert metrics(tmp_path / "ppo", "policy/ratio") == [pytest.approx(1, abs=1e-5)]
