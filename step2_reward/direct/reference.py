"""What the reference policy says of the responses: read once, before training, and kept beside the tokenised
data, so that training holds no second model.
"""

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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.data.batching import deal
from common.data.cache import cache_folder
from common.data.examples import Examples
from common.model.engine import make_frozen
from common.model.loading import load_causal_lm, load_config
from common.model.zero import frozen_config, unpartitioned
from common.runtime.distributed import device, gather_objects, log, rank, sum_tensor_over_ranks
from common.runtime.files import flush_folder, sha256
from common.runtime.options import UserError, world_size
from common.runtime.process import Stopped, stop_anywhere, stop_requested
from common.runtime.progress import Progress
from common.text.tokenizer import load_tokenizer
from step2_reward.direct.data import Choice, Dialogue
from step2_reward.direct.logprobs import response_logprobs
from step2_reward.direct.options import DirectOptions

ROUNDS = 20  # micro-batches after which ranks share what they know, and ask each other whether to stop


class Example(NamedTuple):
    """A record with what the reference says of it; all 0 where a loss needs none."""

    row: Choice
    logprobs: list[float]  # (N,) of its responses
    unrelated: Dialogue | None  # kto: its prompt with a response to another one
    unrelated_logprob: float


class Referenced(Sequence[Example]):
    """Records with what the reference says of them.

    In KTO each prompt is also read with a response to another: one of the next record in a random circle of
    all, good or bad. It stays the same over the run, so that what the reference says of it can be kept too.
    """

    def __init__(self, rows: Sequence[Choice], options: DirectOptions) -> None:
        self.rows, self._max_length = rows, options.max_length
        self._next: np.ndarray | None = None
        if not options.is_paired:
            numbers = np.random.default_rng(options.seed)
            circle = numbers.permutation(len(rows))
            self._next = np.empty_like(circle)
            self._next[circle] = np.roll(circle, -1)
            self._drawn = numbers.random(len(rows))  # which response of the next record, as a share of them
        self.logprobs = np.zeros((0, 0), np.float32)  # (records, most responses), once they are known

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
        asked, answers = self.rows[index].dialogues[0], self.rows[int(self._next[index])].dialogues
        answered = answers[int(self._drawn[index] * len(answers))]
        ids = asked.ids[: asked.start] + answered.ids[answered.start :]
        return Dialogue(ids[: self._max_length], asked.start)


def check_reference(options: DirectOptions, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise UserError when the reference has another vocabulary than the policy."""
    path = options.reference_model_name_or_path
    if path and load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--reference_model_name_or_path {path}: has another vocabulary than --model_name_or_path"
            f" {options.model_name_or_path}; both must read the same tokens"
        )


def load_reference(
    options: DirectOptions, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any]
) -> nn.Module:
    """A reference that is not the model to start from, frozen."""
    frozen = frozen_config(zero)
    path = options.reference_model_name_or_path
    return make_frozen(load_causal_lm(path, tokenizer, frozen or unpartitioned(zero)), frozen)


def with_reference(
    parts: Sequence[Sequence[Choice]], needed: Sequence[Sequence[int]], options: DirectOptions,
    zero: dict[str, Any], pad_token_id: int, load: Callable[[], nn.Module],
) -> list[Referenced]:  # fmt: skip
    """Each of some sets of records with the reference's log-probabilities, from the cache if they are there.

    needed: of each set, the numbers of the records that the run uses; NaN stands for the others until a
    longer run reads them. load: gives the reference, and is called only when something has to be read. Every
    rank must call this.
    """
    sets, model = [Referenced(rows, options) for rows in parts], None
    for rows, examples, numbers in zip(parts, sets, needed, strict=True):
        if not options.kind.has_reference or not len(rows):
            continue
        file = cache_folder(options) / f"reference_{_key(rows, options, zero)}.npy" if rank() == 0 else None
        logprobs = _load(file)
        if logprobs is None:
            widest = max(len(row.ranks) for row in rows) + (not options.is_paired)
            logprobs = torch.full((len(rows), widest), math.nan, device=device())
        missing = [
            i for i, is_missing in zip(numbers, logprobs[numbers].isnan().any(1), strict=True) if is_missing
        ]
        if len(missing) < len(numbers):
            kept = len(numbers) - len(missing)
            log(f"{kept} of {len(numbers)} records: the reference's log-probabilities are in the cache")
        if missing:
            model = model or load()
            _read(model, examples, missing, logprobs, options, pad_token_id, file)
        examples.logprobs = logprobs.cpu().numpy()
    del model
    gc.collect()  # an engine refers to itself
    return sets


def _read(
    model: nn.Module, examples: Referenced, missing: Sequence[int], logprobs: Tensor, options: DirectOptions,
    pad_token_id: int, file: Path | None,
) -> None:  # fmt: skip
    """Fill in the log-probabilities (records, most responses) of the missing records: of all responses, and
    behind them of the unrelated one.

    Records are read by length. What is known is kept in `file` every few seconds, so that the same command
    resumes from there, on any number of ranks.
    """
    model.eval()
    order = sorted(missing, key=lambda i: max(examples.rows[i].lengths))
    progress, start = Progress("reading with the reference", len(order)), time.monotonic()
    size = ROUNDS * options.micro_batch_size * world_size()
    saved = 0
    for begin in range(0, len(order), size):
        stop_anywhere(_stopped(saved, len(order)))
        if stop_requested(options.output_dir):
            _keep(file, logprobs)
            raise Stopped(_stopped(begin, len(order)))
        chosen = order[begin : begin + size]
        part = [examples[i] for i in chosen]
        logprobs[chosen] = _read_part(model, part, logprobs.shape[1], options, pad_token_id)
        if progress.update(begin + len(chosen)):
            _keep(file, logprobs)
            saved = begin + len(chosen)
    model.train()
    _keep(file, logprobs)
    stop_anywhere()
    log(f"{len(order)} records read with the reference in {time.monotonic() - start:.1f} s")


def _stopped(saved: int, total: int) -> str:
    return (
        f"Stopped before the first step; {saved} of {total} records read with the reference are in the cache."
        " Run the same command to resume."
    )


@torch.no_grad()
def _read_part(
    model: nn.Module, part: Sequence[Example], width: int, options: DirectOptions, pad_token_id: int
) -> Tensor:
    """Log-probabilities (records, width) of some records. Each rank reads its share of them, and gets all."""
    found = torch.zeros(len(part), width, device=device())
    lengths = [max(example.row.lengths) for example in part]
    for picked in deal(range(len(part)), lengths, options.micro_batch_size, rank(), world_size()):
        # A rank without records in the last round takes part in it: at ZeRO-3 a forward needs every rank.
        texts = [_dialogues(part[i]) for i in picked or [0]]
        sums, *_ = response_logprobs(model, sum(texts, []), pad_token_id)
        for i, logprobs in zip(picked, sums.split([*map(len, texts)]), strict=False):
            found[i, : len(logprobs)] = logprobs
    return sum_tensor_over_ranks(found)


def _dialogues(example: Example) -> list[Dialogue]:
    return example.row.dialogues + ([example.unrelated] if example.unrelated else [])


def _key(rows: Sequence[Choice], options: DirectOptions, zero: dict[str, Any]) -> str:
    """A name made of all that decides what is read: weights, precision, tokens, and how they are read."""
    parts = [
        _weights(options.reference_model_name_or_path or options.model_name_or_path),
        [zero.get(precision, {}).get("enabled") for precision in ("bf16", "fp16")],
        rows.digest if isinstance(rows, Examples) else [*map(list, rows)],
        None if options.is_paired else [options.seed, options.max_length, inspect.getsource(Referenced)],
        inspect.getsource(response_logprobs),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@lru_cache
def _weights(path: str) -> list[str]:
    """Checksums of a model folder, whole: models trained in part may differ in the middle of a file only."""
    if not Path(path).is_dir():
        return [path, str(getattr(load_config(path), "_commit_hash", None))]
    kinds = ("config.json", "*.safetensors", "*.bin")
    return [f"{file.name} {sha256(file)}" for kind in kinds for file in sorted(Path(path).glob(kind))]


def _load(file: Path | None) -> Tensor | None:
    """What rank 0 has in a file, on every rank; None when there is no such file."""
    found = torch.from_numpy(np.load(file)) if file and file.exists() else None
    shape = gather_objects(found if found is None else found.shape)[0]
    if shape is None:
        return None
    return sum_tensor_over_ranks((torch.zeros(shape) if found is None else found).to(device()))


def _keep(file: Path | None, logprobs: Tensor) -> None:
    """Write to a file, whole or not at all; rank 0 alone has one."""
    if not file:
        return
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as content:
            np.save(content, logprobs.cpu().numpy())
            content.flush()
            os.fsync(content.fileno())
        beside.rename(file)
        flush_folder(file.parent)
    except OSError as error:
        log(f"{file}: not kept: {error}")
    finally:
        beside.unlink(missing_ok=True)
