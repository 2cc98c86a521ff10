"""Broken model folders are refused in one line; unusual ones load."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from common.model.loading import load_causal_lm, load_scalar_model
from common.model.roles import backbone_config, check_scalar_model, policy_config
from common.model.zero import load_zero_config
from common.runtime.distributed import log_once
from common.runtime.options import OptimiserOptions, UserError
from common.text.transformers_internals import attention_implementation
from tests.conftest import assert_close

SIZE = {
    "vocab_size": 10, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FP16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"[UNK]": 0, "[EOS]": 1, "[PAD]": 2, "a": 3}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[EOS]", pad_token="[PAD]")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SIZE)).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    config = LlamaConfig(**SIZE, num_labels=1, reward_mean=0.5, reward_std=2.0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture(autouse=True)
def forget_warnings() -> Iterator[None]:
    log_once.cache_clear()
    yield


def configure(**values: object) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def weights(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        state = load_file(file)
        change(state)
        save_file(state, file, {"format": "pt"})

    return spoil


def zeros(names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: [weight.zero_() for name, weight in state.items() if re.search(names, name)]


def replace(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Spoil:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def after(first: Spoil, *more: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in (first, *more)]


def shard(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2KB")


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def another_shard(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= {"lm_head.weight": "model-00099-of-00002.safetensors"}
    file.write_text(json.dumps(index))


class Marker:
    """Leaves a file if unpickling runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled_code(folder: Path) -> None:
    as_bin(folder)
    state = torch.load(folder / "pytorch_model.bin")
    torch.save({**state, "more": Marker(folder / "it_ran")}, folder / "pytorch_model.bin")


def custom_code(folder: Path) -> None:
    configure(model_type="own", auto_map={"AutoConfig": "code.Own"})(folder)
    (folder / "code.py").write_text("from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n")


def only_an_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


def remove_layer(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".layers.1." in name]:
        del state[name]


FOLDERS: dict[str, tuple[Spoil, list[str]]] = {
    "a layer": (weights(remove_layer), ["missing", "layers.1.input_layernorm.weight", "... (9 in all)"]),
    "more layers": (configure(num_hidden_layers=3), ["missing", "layers.2.", "... (9 in all)"]),
    "vocabulary": (configure(vocab_size=12), ["embed_tokens.weight is (10, 8), not (12, 8)"]),
    "width": (configure(intermediate_size=16), ["is (12, 8), not (16, 8)", "... (6 in all)"]),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), ["no file named model.safetensors"]),
    "cut": (cut("model.safetensors"), ["model.safetensors: not read", "file not fully covered"]),
    "empty": (replace("model.safetensors", b""), ["model.safetensors: is empty"]),
    "zeroed": (replace("model.safetensors", bytes(5000)), ["model.safetensors: not read"]),
    "no shard": (
        after(shard, lambda folder: next(folder.glob("model-00002*")).unlink()),
        ["model-00002-of-", "missing, but named in the index"],
    ),
    "cut shard": (after(shard, lambda f: cut(next(f.glob("model-00002*")).name)(f)), ["model-00002-of-"]),
    "wrong shard": (after(shard, another_shard), ["model-00099-of-00002.safetensors: missing"]),
    "index": (after(shard, replace("model.safetensors.index.json", b"{")), ["index.json:1: not valid JSON"]),
    "index without map": (after(shard, replace("model.safetensors.index.json", b"{}")), ["`weight_map`"]),
    "index of numbers": (
        after(shard, replace("model.safetensors.index.json", b'{"weight_map": {"a": 1}}')),
        ["index.json: not an index of weights"],
    ),
    "pointer": (
        replace("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"),
        ["model.safetensors: is a pointer of Git LFS", "git lfs pull"],
    ),
    "cut bin": (after(as_bin, cut("pytorch_model.bin")), ["pytorch_model.bin: not read"]),
    "empty bin": (after(as_bin, replace("pytorch_model.bin", b"")), ["pytorch_model.bin: is empty"]),
    "code in bin": (pickled_code, ["pytorch_model.bin: not read", "code in it is not run"]),
    "custom code": (custom_code, ["custom code (code.Own)", "not run"]),
    "adapter": (only_an_adapter, ["a peft adapter, not a model", "final/"]),
    "quantised": (configure(quantization_config={"quant_method": "gptq"}), ["quantised weights"]),
    "type": (configure(hidden_size="abc"), ["config.json", "'hidden_size' expected int, got str"]),
    "negative": (configure(num_hidden_layers=-2), ["config.json: num_hidden_layers is -2", "above 0"]),
    "no layers": (configure(num_hidden_layers=0), ["config.json: num_hidden_layers is 0", "above 0"]),
    "heads": (configure(num_attention_heads=3), ["config.json", "not a multiple of the number of attention"]),
    "groups": (configure(num_key_value_heads=3), ["heads are not a multiple of 3 key-value heads"]),
    "inner width": (configure(intermediate_size=-3), ["intermediate_size is -3", "above 0"]),
    "head width": (configure(head_dim=0), ["config.json: head_dim is 0", "above 0"]),
    "positions": (configure(max_position_embeddings=-1), ["max_position_embeddings is -1", "above 0"]),
    "layers without end": (configure(num_hidden_layers=10**8), ["num_hidden_layers is 100000000", "at most"]),
    "epsilon": (configure(rms_norm_eps=float("nan")), ["config.json: rms_norm_eps is nan", "a number"]),
    "negative epsilon": (configure(rms_norm_eps=-1e-5), ["config.json: rms_norm_eps is -1e-05", "below 0"]),
    "rotation": (
        configure(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        ["config.json: rope_theta is 0", "above 0"],
    ),
    "activation": (configure(hidden_act="none"), ["config.json", "'none'"]),
    "model type": (configure(model_type="llamma"), ["config.json", "`llamma`"]),
    "no model type": (replace("config.json", b"{}"), ["config.json", "`model_type`"]),
    "architectures": (configure(architectures="LlamaForCausalLM"), ["architectures is 'LlamaForCausalLM'"]),
    "JSON": (replace("config.json", b'{"a": 1,\n}'), ["config.json:2: not valid JSON"]),
    "UTF-8": (replace("config.json", b'{"a": "\xe9"}'), ["config.json: not read", "utf-8"]),
    "no object": (replace("config.json", b"[]"), ["config.json: must hold one JSON object"]),
}  # fmt: skip


def refusal(check: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("case", FOLDERS)
def test_a_broken_folder_is_refused_in_one_line(
    policy: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """By the check before training and by each loader. No code in the folder runs; nothing reads stdin."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("read from stdin"))
    spoil, parts = FOLDERS[case]
    spoil(policy)
    messages = [
        refusal(policy_config, str(policy), "model_name_or_path"),
        refusal(backbone_config, str(policy), "model_name_or_path"),
        refusal(load_causal_lm, str(policy), tokenizer, None),
    ]
    assert str(policy) in messages[0]
    for part in parts:
        assert part in messages[0] and part in messages[2], messages
    assert not list(policy.rglob("it_ran"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_weight_is_refused(
    policy: Path, tokenizer: PreTrainedTokenizerFast, value: float
) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["model.norm.weight"][3] = state["model.layers.1.mlp.up_proj.weight"][-1, -1] = value

    weights(change)(policy)
    for load in (load_causal_lm, load_scalar_model):
        message = refusal(load, str(policy), tokenizer, None)
        assert f"{policy}: weight model.layers.1.mlp.up_proj.weight holds NaN or Inf" in message


def test_a_weight_too_large_for_fp16_is_refused(policy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    weights(lambda state: state["lm_head.weight"].fill_(1e6))(policy)
    load_causal_lm(str(policy), tokenizer, None)
    assert "lm_head.weight holds NaN or Inf (as float16)" in refusal(
        load_causal_lm, str(policy), tokenizer, FP16
    )


def test_a_file_of_zeros_with_a_valid_header_is_refused(
    policy: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    weights(lambda state: [tensor.zero_() for tensor in state.values()])(policy)
    assert "policy: embeddings: all zeros" in refusal(load_causal_lm, str(policy), tokenizer, None)


def test_a_layer_of_zeros_is_refused(policy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """As in an incomplete file."""
    weights(zeros(r"layers\.1\."))(policy)
    assert "model.layers.1: all zeros" in refusal(load_causal_lm, str(policy), tokenizer, None)


def test_all_zero_matrices_get_one_warning(
    policy: Path, reward: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture
) -> None:
    """Zero vectors, such as biases, and a zero head get none."""
    weights(zeros(r"o_proj|down_proj"))(policy)
    load_causal_lm(str(policy), tokenizer, None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {policy}: weights are all zeros") and "(4 in all)" in line
    weights(zeros("score|model.norm"))(reward)
    load_scalar_model(str(reward), tokenizer, None)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_unexpected_weights_get_one_warning_with_their_number(
    policy: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture, names: str
) -> None:
    weights(lambda s: s.update({f"model.more.{n}": torch.ones(2) for n in names}))(policy)
    policy_config(str(policy), "model_name_or_path")
    load_causal_lm(str(policy), tokenizer, None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {policy}: ignored {len(names)} weights") and "model.more.a" in line
    assert line.endswith("...") == (len(names) > 3)


def test_a_new_head_gets_no_warning(
    policy: Path, reward: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture
) -> None:
    """A language model has an output head instead; a reward model has a scalar head already."""
    for folder in (policy, reward):
        backbone_config(str(folder), "model_name_or_path")
        load_scalar_model(str(folder), tokenizer, None)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("rewrite", [shard, as_bin], ids=["shards", "bin"])
def test_other_file_formats_load_the_same_weights(
    policy: Path, tokenizer: PreTrainedTokenizerFast, rewrite: Spoil
) -> None:
    before = load_causal_lm(str(policy), tokenizer, None).state_dict()
    rewrite(policy)
    after = load_causal_lm(str(policy), tokenizer, None).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_untied_head_is_refused(policy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """For a policy only; a reward model does not use it."""
    weights(lambda state: state.pop("lm_head.weight"))(policy)
    assert "missing: lm_head.weight" in refusal(policy_config, str(policy), "x")
    load_scalar_model(str(policy), tokenizer, None)


def test_a_tied_head_may_be_missing(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_causal_lm(str(tmp_path), tokenizer, None)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- roles --------------------------------------------------------------------------------------------------


def test_each_option_accepts_only_its_kind_of_model(policy: Path, reward: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    LlamaForSequenceClassification(LlamaConfig(**SIZE, num_labels=2)).save_pretrained(two)
    policy_config(str(policy), "x")
    check_scalar_model(str(reward), "x")
    backbone_config(str(policy), "x")
    backbone_config(str(reward), "x")
    for check, folder, parts in [
        (policy_config, reward, ["--x", "not a language model", "with 1 output", "`final/` of step 1"]),
        (policy_config, two, ["--x", "not a language model", "with 2 outputs", "`final/` of step 1"]),
        (check_scalar_model, policy, ["--x", "not a reward model", "LlamaForCausalLM", "`final/` of step 2"]),
        (check_scalar_model, two, ["--x", "not a reward model", "with 2 outputs", "`final/` of step 2"]),
        (backbone_config, two, ["--x", "with 2 outputs", "reward model with one output"]),
    ]:
        message = refusal(check, str(folder), "x")
        assert str(folder) in message and all(part in message for part in parts), message


def test_a_reward_model_without_its_head_is_refused(reward: Path) -> None:
    weights(lambda state: state.pop("score.weight"))(reward)
    for check in (check_scalar_model, backbone_config):
        assert "missing: score.weight" in refusal(check, str(reward), "x")


@pytest.mark.parametrize(
    "values",
    [
        {"reward_std": 0}, {"reward_std": -1.0}, {"reward_std": float("nan")}, {"reward_std": "1"},
        {"reward_std": None}, {"reward_std": True}, {"reward_mean": float("inf")}, {"reward_mean": [0.5]},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_centring_of_scores_is_refused(reward: Path, values: dict) -> None:
    configure(**values)(reward)
    ((name, _),) = values.items()
    for check in (check_scalar_model, backbone_config):
        assert f"config.json: {name} is" in refusal(check, str(reward), "x")


# --- generation_config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "valid", "ignored"),
    [
        ('{"eos_token_id": [1, 3], "temperature": 0.6}', {"eos_token_id": [1, 3]}, "temperature 0.6"),
        ('{"top_p": 0.9, "do_sample": true, "max_new_tokens": -1}', {"top_p": 0.9}, "max_new_tokens -1"),
        ('{"eos_token_id": 1, "watermarking_config": {"a": 1}}', {"eos_token_id": 1}, "watermarking_config"),
        ('{"eos_token_id": "x", "pad_token_id": "y"}', {"eos_token_id": 1}, "eos_token_id x, pad_token_id y"),
        ("[1]", {"eos_token_id": 1}, "must hold one JSON object"),
        ("{bad", {"eos_token_id": 1}, "not valid JSON"),
    ],
)
def test_invalid_values_of_a_generation_config_are_ignored(
    policy: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture, tmp_path: Path,
    content: str, valid: dict, ignored: str,
) -> None:  # fmt: skip
    (policy / "generation_config.json").write_text(content)
    configure(eos_token_id=1)(policy)
    model = load_causal_lm(str(policy), tokenizer, None)
    (line,) = capsys.readouterr().out.splitlines()
    assert "generation_config.json" in line and ignored in line
    model.save_pretrained(tmp_path / "final")
    written = GenerationConfig.from_pretrained(tmp_path / "final")
    assert {name: getattr(written, name) for name in valid} == valid and written.pad_token_id == 2


def test_a_valid_generation_config_is_unchanged(
    policy: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture
) -> None:
    (policy / "generation_config.json").write_text(
        '{"do_sample": true, "top_p": 0.9, "eos_token_id": [1, 3]}'
    )
    generation = load_causal_lm(str(policy), tokenizer, None).generation_config
    assert (generation.do_sample, generation.top_p, generation.eos_token_id) == (True, 0.9, [1, 3])
    assert not capsys.readouterr().out


def test_attention_kernels_give_the_same_logits(policy: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    logits = {}
    for kernels in ("auto", "eager", "sdpa"):
        zero = load_zero_config("", OptimiserOptions(attn_implementation=kernels), 1e-5)
        model = load_causal_lm(str(policy), tokenizer, zero)
        assert kernels in ("auto", attention_implementation(model.config))
        logits[kernels] = model(ids).logits
    assert_close(logits["eager"], logits["sdpa"])
    assert_close(logits["auto"], logits["sdpa"])
