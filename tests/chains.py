"""Arithmetic in steps, whose right lines are known: questions, answers with errors, and labels.

The question `7+5-3:` has the right answer `7+5=12`, `12-3=9`, a line for each partial result.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST, OPERANDS, OFFSETS = 30, range(1, 10), (-3, -2, -1, 1, 2, 3)
Line = str


def make_question(draw: random.Random, operations: int) -> str:
    """A question whose partial results are from 0 to LARGEST."""
    value = draw.randint(1, LARGEST)
    text = str(value)
    for _ in range(operations):
        sign, operand = draw.choice(
            [(s, n) for s in (1, -1) for n in OPERANDS if 0 <= value + s * n <= LARGEST]
        )
        value += sign * operand
        text += f"{'+' if sign > 0 else '-'}{operand}"
    return f"{text}:"


def answer_lines(question: str, draw: random.Random | None = None, error_rate: float = 0.0) -> list[Line]:
    """An answer. A result is wrong by 1 to 3 with probability `error_rate`; later lines continue from it."""
    first, *operations = re.findall(r"[+-]?\d+", question)
    value, lines = int(first), []
    for operation in operations:
        result = max(0, value + int(operation))
        if draw and draw.random() < error_rate:
            result = draw.choice([result + offset for offset in OFFSETS if result + offset >= 0])
        lines.append(f"{value}{operation}={result}")
        value = result
    return lines


def labels(question: str, lines: list[Line]) -> list[int | None]:
    """1 up to the first wrong line, 0 for it, None after it."""
    right = [line == true for line, true in zip(lines, answer_lines(question), strict=True)]
    errors = [*right, False].index(False)
    return [1] * errors + [0, *[None] * len(right)][: len(right) - errors]


def is_right(question: str, response: str) -> bool:
    """Whether the result of the last line is right."""
    return response.rstrip("\n").rpartition("=")[2] == answer_lines(question)[-1].rpartition("=")[2]


def compared(draw: random.Random, count: int, operations: int, error_rate: float) -> Iterator[dict]:
    """Questions with a response whose result is right and one whose result is wrong."""
    for _ in range(count):
        question, by_result = make_question(draw, operations), {}
        while len(by_result) < 2:
            lines = answer_lines(question, draw, error_rate)
            by_result[is_right(question, "\n".join(lines))] = lines
        yield {"prompt": question, "chosen": by_result[True], "rejected": by_result[False]}


def as_preference(record: dict[str, Any]) -> dict[str, Any]:
    """A record of `compared` for an outcome model."""
    return record | {side: "\n".join(record[side]) for side in ("chosen", "rejected")}


def as_steps(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Both responses of a record of `compared` for a process model."""
    for side in ("chosen", "rejected"):
        lines, question = record[side], record["prompt"]
        yield {"prompt": question, "steps": lines, "labels": labels(question, lines)}


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def build_model(folder: Path, hidden_size: int, layers: int, heads: int) -> Path:
    """A Llama with random weights. Every character is a token."""
    names = ["<pad>", "</s>", *"0123456789+-=:\n"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
