"""A tiny model whose tokens are letters, runs of a main on it, and comparison of what they wrote."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.conftest import assert_close

PAD, EOS = 0, 1
LETTERS = "abcdefghij "
IDS = {letter: number for number, letter in enumerate(LETTERS, start=2)}
SIZES = {
    "vocab_size": 2 + len(LETTERS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": PAD,
    "eos_token_id": EOS, "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
OF_THE_MACHINE = ("time/", "memory/")


def ids_of(text: str) -> list[int]:
    return [IDS[letter] for letter in text]


def text_of(ids: Sequence[int]) -> str:
    """The letters alone."""
    return "".join(LETTERS[number - 2] for number in ids if number > EOS)


def write_models(folder: Path) -> Path:
    """Language models in `model` and `reference`, a reward model with centred scores in `reward`."""
    backend = Tokenizer(models.WordLevel({"<pad>": PAD, "</s>": EOS, **IDS}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    scorer = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))
    scorer.config.reward_mean, scorer.config.reward_std = 0.3, 0.7
    reference = LlamaForCausalLM(model.config)
    for name, one in (("model", model), ("reference", reference), ("reward", scorer)):
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.ndim == 1:  # norms, which start as ones
                    parameter.add_(0.2 * torch.randn_like(parameter))
        one.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def words(options: Mapping[str, Any]) -> list[str]:
    """A command line."""
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", *([str(value)] if not isinstance(value, list) else map(str, value)))
    ]


def logged(output: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl, without what the clock and the machine decide."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE) and "per_second" not in k}
        for line in lines
    ]


def tolerance(name: str) -> float:
    """Absolute tolerance. KL is a difference of log-probabilities, a standardised score one of scores; both
    are of order 1.
    """
    if name.startswith("reward/"):
        return 3e-6
    is_difference = name.startswith(("kl/", "rollout/gap_")) or name in ("eval/kl", "policy/update_kl")
    return 1e-5 if is_difference else 1e-6


def compare_metrics(output: Path, expected: list[Mapping[str, float]]) -> None:
    """Exactly these metrics, line by line, each with its value."""
    lines = logged(output)
    assert len(lines) == len(expected)
    differing = [line.keys() ^ right.keys() for line, right in zip(lines, expected, strict=True)]
    assert not any(differing), f"metrics logged or recomputed, but not both, by line: {differing}"
    wrong = {
        f"{name} of line {number}": (line[name], float(value))
        for number, (line, right) in enumerate(zip(lines, expected, strict=True))
        for name, value in right.items()
        if not math.isclose(line[name], float(value), rel_tol=1e-5, abs_tol=tolerance(name))
    }
    assert not wrong, wrong


def compare_weights(folder: Path, model: nn.Module) -> None:
    """The weights in a folder are those of the model."""
    saved = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in model.state_dict().items() if name in saved}
    assert {*dict(model.named_parameters())} <= {*saved}
    assert_close(saved, weights)


def compare_adapted(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """The weights of all linear layers of the tiny model, and maybe a head, are these."""
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in weights} - {"score"} == layers
    saved = load_file(folder / "model.safetensors")
    assert_close({name: saved[name] for name in weights}, dict(weights))
