"""Perplexity of language models on demonstrations, and sample answers.

A part of step 1, and a command that compares models on the same texts:

    bash launch/evaluate_sft.sh --model_name_or_path DIR1 DIR2 --eval_data F.jsonl
"""

import contextlib
import gc
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common.data.multi_encoder import load_alike
from common.model.engine import gathered_weights, make_frozen
from common.model.families import position_limit
from common.model.forward import base_model, response_logits
from common.model.loading import load_causal_lm, longest_input
from common.model.roles import policy_config
from common.model.vocabulary import spare_ids
from common.model.zero import frozen_config, load_zero_config
from common.runtime.distributed import init_distributed, log, rank, sum_over_ranks
from common.runtime.files import is_folder, write_json
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError, world_size
from common.runtime.process import UNWRITTEN, run_main, stop_anywhere, stop_between_steps
from common.runtime.progress import Progress, track
from common.text.record_formats import Record
from common.text.segments import plain_demonstration
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step1_sft.data import Demonstration, collate, demonstration
from step1_sft.loss import sft_loss
from step1_sft.options import EvaluateOptions, SFTOptions
from step1_sft.packing import micro_batches

COLUMNS = ("model", "records", "response_tokens", "loss", "perplexity", "bits_per_byte")


class Entrant(NamedTuple):
    """A model of the comparison, and the records in its own tokens."""

    path: str
    encoder: SegmentEncoder
    rows: list[Demonstration]


class Answer(NamedTuple):
    """A prompt and what a model says to it, as texts."""

    prompt: str
    answer: str


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(EvaluateOptions)
    check_output(options.output)
    as_trained = SFTOptions(
        max_length=options.max_length, micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * world_size(),
    )  # fmt: skip
    load_zero_config(options.zero_config, as_trained, as_trained.learning_rate)
    paths = options.model_name_or_path
    configs = [policy_config(path, "model_name_or_path") for path in paths]
    lengths = [longest_input(config, options.max_length, "max_length") for config in configs]
    encoders = [SegmentEncoder(load_tokenizer(path)) for path in paths]
    # Whole records alone, so that all models are measured on the same text.
    convert = partial(demonstration, overlong="drop", loss_on="response")
    converts = [
        partial(convert, encoder=encoder, max_length=length)
        for encoder, length in zip(encoders, lengths, strict=True)
    ]
    data = load_alike(options.eval_data, options, Demonstration, converts, options.max_eval_samples)
    init_distributed()
    stop_anywhere(UNWRITTEN)

    # 2. One model after the other.
    found = []
    for entrant in map(Entrant, paths, encoders, data.rows):
        found.append(_measure_entrant(entrant, data.records, options, as_trained))
        gc.collect()
        torch.cuda.empty_cache()

    # 3. What was found.
    stop_between_steps()
    for row in found:
        log(f"\n# {row['model']}\n\n{as_markdown([Answer(**sample) for sample in row['samples']])}")
    log("\n" + _table(found))
    if options.output and rank() == 0:
        write_json(Path(options.output), found)


def evaluate(
    engine: Any, rows: Sequence[Demonstration], options: SFTOptions, pad_token_id: int
) -> dict[str, float]:
    """eval/loss, the mean over all learnt tokens of all rows on all ranks, and its exponential."""
    nats, tokens = negative_log_likelihood(engine, rows, options, pad_token_id)
    return {"eval/loss": nats / tokens, "eval/perplexity": _perplexity(nats / tokens)}


@torch.no_grad()
def negative_log_likelihood(
    model: nn.Module, rows: Sequence[Demonstration], options: SFTOptions, pad_token_id: int
) -> tuple[float, float]:
    """Sum over all learnt tokens of all rows on all ranks, in nats, and the number of these tokens.

    model: an engine, or a plain model on this rank's device.
    """
    model.eval()
    total = count = 0.0
    batches = micro_batches([len(row.ids) for row in rows], options)
    for chosen in track("reading demonstrations", batches, len(rows)):
        # A rank without rows in the last round still takes part in it: at ZeRO-3 a forward needs every rank.
        batch = collate([[rows[i] for i in row] for row in chosen or [[0]]], pad_token_id)
        logits = response_logits(model, batch.input_ids, batch.positions, batch.position_ids)
        loss = sft_loss(logits, batch.labels, num_tokens=1)
        if chosen:
            total, count = total + loss.item(), count + len(batch.labels)
    total, count = sum_over_ranks(total, count)
    model.train()
    return total, count


@torch.no_grad()
def sample_answers(
    model: nn.Module, rows: Sequence[Demonstration], encoder: SegmentEncoder, max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to the prompts of the rows, as long as the model has positions for."""
    model.eval()
    answers = []
    is_engine = hasattr(model, "module")
    progress = Progress("sample answers", len(rows))
    with gathered_weights(model) if is_engine else contextlib.nullcontext(model) as whole_model:
        limit = position_limit(whole_model.config) or math.inf
        for number, row in enumerate(rows, start=1):
            prompt = torch.tensor([row.prompt_ids], device=model.device)  # (1, P)
            whole = whole_model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(max_new_tokens, limit - len(row.prompt_ids)),
                do_sample=False,
                suppress_tokens=spare_ids(base_model(whole_model)) or None,
                synced_gpus=False,
            )
            ids = whole[0, prompt.shape[1] :].tolist()
            has_ended = ids[-1] in base_model(whole_model).end_ids
            answer = encoder.decode_response(row.prompt_ids, ids[: -1 if has_ended else None])
            answers.append(Answer(encoder.decode_prompt(row.prompt_ids), answer))
            progress.update(number)
    model.train()
    return answers


def as_markdown(answers: Sequence[Answer]) -> str:
    return "\n\n---\n\n".join(f"**{prompt}**\n\n{answer}" for prompt, answer in answers)


def response_bytes(record: Record, last_only: bool = False) -> int:
    """UTF-8 bytes of the responses of a record, or of its last one, without what a chat template adds."""
    record = plain_demonstration(record)
    turns = record["messages"] if "messages" in record else record["completion"]
    if isinstance(turns, str):
        return len(turns.encode())
    replies = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if last_only or "messages" not in record:
        replies = replies[-1:]
    return sum(len(reply.encode()) for reply in replies)


def check_output(path: str) -> None:
    """Raise UserError unless a file can be written there, or none is to be."""
    folder = Path(path).parent
    if path and not is_folder(folder):
        raise UserError(f"--output {path}: there is no such folder")
    if path and is_folder(path):
        raise UserError(f"--output {path}: is a folder; name a file in it")
    if path and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write in this folder")


def _measure_entrant(
    entrant: Entrant, records: Sequence[Record], options: EvaluateOptions, as_trained: SFTOptions
) -> dict[str, Any]:
    """Figures and answers of one model, by the names of COLUMNS; bits per byte count EOS as no byte."""
    path, encoder, rows = entrant
    zero = load_zero_config(options.zero_config, as_trained, as_trained.learning_rate)
    model = make_frozen(load_causal_lm(path, encoder.tokenizer, zero), frozen_config(zero))
    nats, tokens = negative_log_likelihood(model, rows, as_trained, encoder.tokenizer.pad_token_id)
    answers = sample_answers(model, rows[: options.num_samples], encoder, options.sample_length)
    last_only = encoder.chat_template.changes_replies(encoder.tokenizer.eos_token)
    num_bytes = sum(response_bytes(record, last_only) for record in records)
    figures = (nats / tokens, _perplexity(nats / tokens), nats / math.log(2) / num_bytes)
    found = dict(zip(COLUMNS, (path, len(rows), int(tokens), *figures), strict=True))
    return found | {"samples": [answer._asdict() for answer in answers]}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _table(found: Sequence[dict[str, Any]]) -> str:
    """The figures as Markdown in columns."""
    cells = [
        [f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS]
        for row in found
    ]
    cells = [[name.replace("_", " ") for name in COLUMNS], *cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    run_main(main)
