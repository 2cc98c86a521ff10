"""Perplexity of language models on demonstrations, and sample answers.

Used by step 1, and as a command that compares models on the same texts:

    bash launch/evaluate_sft.sh --model_name_or_path DIR1 DIR2 --eval_data F.jsonl
"""

import gc
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from common.data.multi_encoder import load_shared_records
from common.generation.generate import PolicyEngine, load_policy, sample_answers
from common.model.engine_protocol import Engine
from common.model.families import max_positions
from common.model.forward import base_model, label_pass, pad_token_id
from common.model.head import Targets
from common.model.loading import fit_to_model
from common.model.roles import policy_config
from common.model.zero import load_inference_config
from common.runtime.distributed import init_distributed, log, rank, sum_over_ranks
from common.runtime.files import exists, is_file, is_folder, write_json
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError, world_size
from common.runtime.process import UNWRITTEN, run_main, stop_anywhere, stop_between_steps
from common.runtime.progress import track
from common.text.record_formats import Record
from common.text.segments import plain_demonstration
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step1_sft.data import Demonstration, collate, tokenize_demonstration
from step1_sft.loss import sft_loss
from step1_sft.options import EvaluateSFTOptions, GreedyOptions, SampleAnswerOptions, SFTOptions
from step1_sft.packing import micro_batches

COLUMNS = ("model", "records", "response_tokens", "loss", "perplexity", "bits_per_byte")


class Candidate(NamedTuple):
    """A model of the comparison, and the records tokenised for it."""

    path: str
    encoder: SegmentEncoder
    rows: list[Demonstration]


class SampleAnswer(NamedTuple):
    """A prompt and a model's answer to it, as text."""

    prompt: str
    answer: str


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(EvaluateSFTOptions)
    check_output(options.output)
    as_trained = SFTOptions(
        max_length=options.max_length, micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * world_size(),
    )  # fmt: skip
    load_inference_config(options)
    paths = options.model_name_or_path
    configs = [policy_config(path, "model_name_or_path") for path in paths]
    lengths = [fit_to_model(options, config).max_length for config in configs]
    encoders = [SegmentEncoder(load_tokenizer(path)) for path in paths]
    # Overlong records are dropped, so that all models are evaluated on the same text.
    convert = partial(tokenize_demonstration, overlong="drop", loss_on="response")
    converts = [
        partial(convert, encoder=encoder, max_length=length)
        for encoder, length in zip(encoders, lengths, strict=True)
    ]
    data = load_shared_records(options.eval_data, options, Demonstration, converts, options.max_eval_samples)
    init_distributed()
    stop_anywhere(UNWRITTEN)

    # 2. Evaluate one model after the other.
    results = []
    for candidate in map(Candidate, paths, encoders, data.rows):
        results.append(_evaluate_candidate(candidate, data.records, options, as_trained))
        gc.collect()
        torch.cuda.empty_cache()

    # 3. Write the results.
    stop_between_steps()
    for row in results:
        answers = [SampleAnswer(**sample) for sample in row["samples"]]
        log(f"\n# {row['model']}\n\n{answers_as_markdown(answers)}")
    log("\n" + _table(results))
    if options.output and rank() == 0:
        write_json(Path(options.output), results)


def evaluate(engine: Engine, rows: Sequence[Demonstration], options: SFTOptions) -> dict[str, float]:
    """Return eval/loss, the mean over the trained tokens of all ranks, and eval/perplexity."""
    nats, tokens = negative_log_likelihood(engine, rows, options)
    return {"eval/loss": nats / tokens, "eval/perplexity": _perplexity(nats / tokens)}


@torch.no_grad()
def negative_log_likelihood(
    model: nn.Module, rows: Sequence[Demonstration], options: SFTOptions
) -> tuple[float, float]:
    """Return the sum over the trained tokens of all ranks, in nats, and the number of these tokens.

    model: an engine, or a plain model on this rank's device.
    """
    model.eval()
    total = count = 0.0
    batches = micro_batches([len(row.ids) for row in rows], options)
    for batch_rows, is_real in track("evaluating demonstrations", batches, len(rows)):
        batch = collate([[rows[i] for i in row] for row in batch_rows], pad_token_id(model))
        targets = Targets(batch.labels)
        logprobs = label_pass(model, batch.input_ids, batch.positions, targets, batch.position_ids).logprobs
        loss = sft_loss(logprobs, num_tokens=1)
        if is_real:
            total, count = total + loss.item(), count + len(batch.labels)
    total, count = sum_over_ranks(total, count)
    model.train()
    return total, count


def greedy_answers(
    policy: PolicyEngine, rows: Sequence[Demonstration], encoder: SegmentEncoder, options: SampleAnswerOptions
) -> list[SampleAnswer]:
    """Answer the prompts of the rows by greedy decoding, within the model's context length."""
    if not rows:
        return []
    room = max_positions(base_model(policy).config) - max(len(row.prompt_ids) for row in rows)
    longest = min(options.sample_length, room)
    gathers = options.gather_for_generation
    greedy = GreedyOptions(max_response_length=longest, gather_for_generation=gathers)
    prompts = {number: row.prompt_ids for number, row in enumerate(rows)}
    answers = sample_answers(policy, encoder, prompts, greedy, step=0)
    policy.train()
    return [SampleAnswer(encoder.decode_prompt(ids), answers[number].text) for number, ids in prompts.items()]


def answers_as_markdown(answers: Sequence[SampleAnswer]) -> str:
    return "\n\n---\n\n".join(f"**{prompt}**\n\n{answer}" for prompt, answer in answers)


def response_bytes(record: Record, last_only: bool = False) -> int:
    """Count the UTF-8 bytes of a record's responses, or of the last one, without chat-template text."""
    record = plain_demonstration(record)
    turns = record["messages"] if "messages" in record else record["completion"]
    if isinstance(turns, str):
        return len(turns.encode())
    replies = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if last_only or "messages" not in record:
        replies = replies[-1:]
    return sum(len(reply.encode()) for reply in replies)


def check_output(path: str) -> None:
    """Raise UserError unless the file can be written or `path` is empty."""
    folder = Path(path).parent
    if path and not is_folder(folder):
        raise UserError(f"--output {path}: there is no such folder")
    if path and is_folder(path):
        raise UserError(f"--output {path}: is a folder; name a file in it")
    if exists(path) and not is_file(path):
        raise UserError(f"--output {path}: is a device; name a file")
    if path and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write in this folder")


def _evaluate_candidate(
    candidate: Candidate, records: Sequence[Record], options: EvaluateSFTOptions, as_trained: SFTOptions
) -> dict[str, Any]:
    """Return COLUMNS and the sample answers of one model. Bits per byte count EOS as no byte."""
    path, encoder, rows = candidate
    model = load_policy(path, encoder, load_inference_config(options))
    nats, tokens = negative_log_likelihood(model, rows, as_trained)
    answers = greedy_answers(model, rows[: options.num_samples], encoder, options)
    last_only = encoder.chat_template.changes_replies(encoder.tokenizer.eos_token)
    num_bytes = sum(response_bytes(record, last_only) for record in records)
    metrics = (nats / tokens, _perplexity(nats / tokens), nats / math.log(2) / num_bytes)
    columns = dict(zip(COLUMNS, (path, len(rows), int(tokens), *metrics), strict=True))
    return columns | {"samples": [answer._asdict() for answer in answers]}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _table(results: Sequence[dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    cells = [
        [f"{row[name]:.4f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS]
        for row in results
    ]
    cells = [[name.replace("_", " ") for name in COLUMNS], *cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    run_main(main)
