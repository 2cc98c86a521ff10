"""Reference log-probabilities: computed once before training and cached, so that training needs one model."""

import gc
import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.data.cache import cache_folder
from common.data.examples import Examples
from common.model.engine import make_frozen
from common.model.loading import load_causal_lm, load_config
from common.model.zero import frozen_config, unpartitioned
from common.runtime.distributed import device, log, on_first_rank, rank, sum_tensor_over_ranks
from common.runtime.files import flush_folder, sha256
from common.runtime.options import UserError, reason, world_size
from common.runtime.process import Stopped, stop_anywhere, stop_requested
from common.runtime.progress import Progress
from common.text.tokenizer import load_tokenizer
from step2_reward.direct.data import Choice, Dialogue, Example
from step2_reward.direct.logprobs import logprobs_of_all, response_logprobs
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.rewards import length_weighted_sums

ROUNDS = 20  # micro-batches between exchanges of results and stop requests among the ranks


class ReferencedExamples(Sequence[Example]):
    """Records with their reference log-probabilities.

    For kto each prompt also gets an unrelated response, desirable or not: a response of the next record in a
    random cycle through all records. The cycle is fixed, so that its log-probabilities can be cached.
    """

    def __init__(self, rows: Sequence[Choice], options: DirectOptions) -> None:
        self.rows, self._max_length = rows, options.max_length
        self._next: np.ndarray | None = None
        if options.kind.has_point:
            generator = np.random.default_rng(options.seed)
            cycle = generator.permutation(len(rows))
            self._next = np.empty_like(cycle)
            self._next[cycle] = np.roll(cycle, -1)
            self._drawn = generator.random(len(rows))  # selects a response of the next record
        self.logprobs = np.zeros((0, 0), np.float32)  # (records, most responses), set once computed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row, unrelated = self.rows[index], self._unrelated(index)
        logprobs = self.logprobs[index].tolist() if len(self.logprobs) else [0.0] * (len(row.ranks) + 1)
        count = len(row.ranks)
        return Example(row, logprobs[:count], unrelated, logprobs[count] if unrelated else 0.0)

    def _unrelated(self, index: int) -> Dialogue | None:
        if self._next is None:
            return None
        dialogue, others = self.rows[index].dialogues[0], self.rows[int(self._next[index])].dialogues
        other = others[int(self._drawn[index] * len(others))]
        ids = dialogue.ids[: dialogue.start] + other.ids[other.start :]
        return Dialogue(ids[: self._max_length], dialogue.start)


def check_reference(options: DirectOptions, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError when the vocabularies of reference and policy differ."""
    path = options.reference_model_name_or_path
    if path and load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--reference_model_name_or_path {path}: has another vocabulary than --model_name_or_path"
            f" {options.model_name_or_path}; the tokenizers must be the same"
        )


def load_reference(
    options: DirectOptions, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any]
) -> nn.Module:
    """Load --reference_model_name_or_path, frozen."""
    frozen = frozen_config(zero)
    path = options.reference_model_name_or_path
    return make_frozen(load_causal_lm(path, tokenizer, frozen or unpartitioned(zero)), frozen)


def with_reference(
    parts: Sequence[Sequence[Choice]], needed: Sequence[Sequence[int]], options: DirectOptions,
    zero: dict[str, Any], load: Callable[[], nn.Module],
) -> list[ReferencedExamples]:  # fmt: skip
    """Add reference log-probabilities to sets of records, from the cache where possible.

    needed: for each set, the indices of the records that the run uses; the others stay NaN until a longer run
    needs them. load: loads the reference; called only when something is missing. Every rank must call this.
    """
    sets, model = [ReferencedExamples(rows, options) for rows in parts], None
    for rows, examples, numbers in zip(parts, sets, needed, strict=True):
        if not options.kind.has_reference or not len(rows):
            continue
        file = cache_folder(options) / f"reference_{_key(rows, options, zero)}.npy" if rank() == 0 else None
        logprobs = _load(file)
        if logprobs is None:
            widest = max(len(row.ranks) for row in rows) + options.kind.has_point
            logprobs = torch.full((len(rows), widest), math.nan, device=device())
        missing = [
            i for i, is_missing in zip(numbers, logprobs[numbers].isnan().any(1), strict=True) if is_missing
        ]
        if len(missing) < len(numbers):
            cached = len(numbers) - len(missing)
            log(f"reference log-probabilities: {cached} of {len(numbers)} records are in the cache")
        if missing:
            model = model or load()
            _fill_in(model, examples, missing, logprobs, options, file)
        examples.logprobs = logprobs.cpu().numpy()
    del model
    gc.collect()  # an engine has reference cycles
    return sets


def _fill_in(
    model: nn.Module, examples: ReferencedExamples, missing: Sequence[int], logprobs: Tensor,
    options: DirectOptions, file: Path | None,
) -> None:  # fmt: skip
    """Fill in the rows of missing records in `logprobs` (records, most responses), sorted by length.

    A row holds the responses, then the unrelated one. `file` is saved every few seconds, so that the same
    command can resume on any number of ranks.
    """
    model.eval()
    order = sorted(missing, key=lambda i: max(examples.rows[i].lengths))
    progress, start = Progress("reference log-probabilities", len(order)), time.monotonic()
    size = ROUNDS * options.micro_batch_size * world_size()
    saved = 0
    for begin in range(0, len(order), size):
        stop_anywhere(_stopped(saved, len(order)))
        if stop_requested(options.output_dir):
            _save(file, logprobs)
            raise Stopped(_stopped(begin, len(order)))
        indices = order[begin : begin + size]
        part = [examples[i] for i in indices]
        logprobs[indices] = logprobs_of_all(model, part, logprobs.shape[1], options)
        if progress.update(begin + len(indices)):
            _save(file, logprobs)
            saved = begin + len(indices)
    model.train()
    _save(file, logprobs)
    stop_anywhere()
    seconds = time.monotonic() - start
    log(f"reference log-probabilities of {len(order)} records computed in {seconds:.1f} s")


def _stopped(saved: int, total: int) -> str:
    return (
        f"Stopped before the first step. Reference log-probabilities of {saved} of {total} records are in the"
        " cache. Run the same command to resume."
    )


def _key(rows: Sequence[Choice], options: DirectOptions, zero: dict[str, Any]) -> str:
    """Hash the inputs of the log-probabilities: weights, precision, tokens and code."""
    is_4bit = options.load_in_4bit and not options.reference_model_name_or_path
    four_bit = ["nf4", options.double_quantisation] if is_4bit else []
    parts = [
        _weights(options.reference_model_name_or_path or options.model_name_or_path),
        [zero.get(precision, {}).get("enabled") for precision in ("bf16", "fp16")] + four_bit,
        rows.digest if isinstance(rows, Examples) else [*map(list, rows)],
        [options.seed, options.max_length, inspect.getsource(ReferencedExamples)]
        if options.kind.has_point
        else None,
        inspect.getsource(response_logprobs),
    ]
    if options.ld_alpha != 1:
        parts += [options.ld_alpha, inspect.getsource(length_weighted_sums)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@lru_cache
def _weights(path: str) -> list[str]:
    """Hash a model folder completely: partly trained models may differ only in the middle of a file."""
    if not Path(path).is_dir():
        return [path, str(getattr(load_config(path), "_commit_hash", None))]
    kinds = ("config.json", "*.safetensors", "*.bin")
    return [f"{file.name} {sha256(file)}" for kind in kinds for file in sorted(Path(path).glob(kind))]


def _load(file: Path | None) -> Tensor | None:
    """Load rank 0's file and broadcast it to all ranks; None when it does not exist."""
    content: list[Tensor] = []
    shape = on_first_rank(_read, file, content)
    if shape is None:
        return None
    return sum_tensor_over_ranks((content[0] if content else torch.zeros(shape)).to(device()))


def _read(file: Path, content: list[Tensor]) -> torch.Size | None:
    """Append the tensor in the file, if it exists, to `content`; returns its shape."""
    try:
        content += [torch.from_numpy(np.load(file))] if file.exists() else []
    except Exception as error:  # noqa: BLE001 - the file may hold anything
        raise UserError(f"{file}: damaged: {reason(error)}; delete the file") from None
    return content[0].shape if content else None


def _save(file: Path | None, logprobs: Tensor) -> None:
    """Write the file atomically on rank 0; the other ranks have none."""
    if not file:
        return
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as content:
            np.save(content, logprobs.cpu().numpy())
            content.flush()
            os.fsync(content.fileno())
        temporary.rename(file)
        flush_folder(file.parent)
    except OSError as error:
        log(f"{file}: not saved: {error}")
    finally:
        temporary.unlink(missing_ok=True)
