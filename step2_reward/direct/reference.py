"""What the reference policy says of the responses: read once, before training, and kept beside the tokenised
data, so that training holds no second model.
"""

import gc
import hashlib
import inspect
import json
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

from common.data import Examples, deal
from common.distributed import device, gather_objects, log, rank, sum_tensor_over_ranks
from common.engine import make_frozen
from common.files import flush_folder, sha256
from common.models import load_causal_lm, load_config
from common.options import UserError, world_size
from common.prepare import REPORT_SECONDS, cache_folder
from common.process import Stopped, stop_requested
from common.tokenization import load_tokenizer
from common.zero import frozen_config, unpartitioned
from step2_reward.direct.data import Choice, Dialogue
from step2_reward.direct.logprobs import response_logprobs
from step2_reward.direct.options import DirectOptions

ROUNDS = 20  # micro-batches after which ranks ask each other whether to stop


class Example(NamedTuple):
    """A record with what the reference says of it; all 0 where a loss needs none."""

    row: Choice
    logprobs: list[float]  # (N,) of its responses
    unrelated: Dialogue | None  # kto: its prompt with a response to another one
    unrelated_logprob: float


class Referenced(Sequence[Example]):
    """Records with what the reference says of them.

    In KTO each prompt is also read with a response to another: that of the next record in a random circle of
    all, which stays the same over the run, so that what the reference says of it can be kept too.
    """

    def __init__(self, rows: Sequence[Choice], options: DirectOptions) -> None:
        self._rows, self._max_length = rows, options.max_length
        self._next: np.ndarray | None = None
        if not options.is_paired:
            circle = np.random.default_rng(options.seed).permutation(len(rows))
            self._next = np.empty_like(circle)
            self._next[circle] = np.roll(circle, -1)
        self.logprobs = np.zeros((0, 0), np.float32)  # (records, most responses), once they are known

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row, unrelated = self._rows[index], self._unrelated(index)
        logprobs = self.logprobs[index].tolist() if len(self.logprobs) else [0.0] * (len(row.ranks) + 1)
        count = len(row.ranks)
        return Example(row, logprobs[:count], unrelated, logprobs[count] if unrelated else 0.0)

    def _unrelated(self, index: int) -> Dialogue | None:
        if self._next is None:
            return None
        asked, answered = (self._rows[i].dialogues[0] for i in (index, int(self._next[index])))
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
    parts: Sequence[Sequence[Choice]], options: DirectOptions, zero: dict[str, Any], pad_token_id: int,
    load: Callable[[], nn.Module],
) -> list[Referenced]:  # fmt: skip
    """Each of some sets of records with the reference's log-probabilities, from the cache if they are there.

    load: gives the reference, and is called only when something has to be read. Every rank must call this.
    """
    sets, model = [Referenced(rows, options) for rows in parts], None
    for rows, examples in zip(parts, sets, strict=True):
        if not options.kind.has_reference or not len(rows):
            continue
        file, known = None, None
        if rank() == 0:
            file = cache_folder(options) / f"reference_{_key(rows, options, zero)}.npy"
            known = torch.from_numpy(np.load(file)) if file.exists() else None
        if shape := gather_objects(known if known is None else known.shape)[0]:
            log(f"{len(rows)} records: the reference's log-probabilities are in the cache")
            whole = torch.zeros(shape) if known is None else known
            examples.logprobs = sum_tensor_over_ranks(whole.to(device())).cpu().numpy()
            continue
        model = model or load()
        examples.logprobs = _read(model, examples, options, pad_token_id).cpu().numpy()
        if file:
            _keep(file, examples.logprobs)
    del model
    gc.collect()  # an engine refers to itself
    return sets


@torch.no_grad()
def _read(model: nn.Module, examples: Referenced, options: DirectOptions, pad_token_id: int) -> Tensor:
    """Log-probabilities (records, most responses) of all responses, and behind them of the unrelated one.

    Each rank reads its part, and gets all.
    """
    model.eval()
    start = shown = time.monotonic()
    lengths = [max(examples[i].row.lengths) for i in range(len(examples))]
    mine = deal(range(len(examples)), lengths, options.micro_batch_size, rank(), world_size())
    found: dict[int, Tensor] = {}
    for number, picked in enumerate(mine):
        if number % ROUNDS == 0 and stop_requested(options.output_dir):
            raise Stopped("stopped before the first step, as asked; the same command begins again")
        if time.monotonic() > shown + REPORT_SECONDS:
            shown = time.monotonic()
            left = (shown - start) * (len(mine) / number - 1)
            log(f"reading with the reference: {number / len(mine):.0%}, {left:.0f} s left")
        # A rank without records in the last round takes part in it: at ZeRO-3 a forward needs every rank.
        texts = [_dialogues(examples[i]) for i in picked or [0]]
        sums, _ = response_logprobs(model, sum(texts, []), pad_token_id)
        found.update(zip(picked, sums.split([*map(len, texts)]), strict=False))
    model.train()
    width = max(gather_objects(max(map(len, found.values()), default=0)))
    whole = torch.zeros(len(examples), width, device=device())
    for index, logprobs in found.items():
        whole[index, : len(logprobs)] = logprobs
    log(f"{len(examples)} records read with the reference in {time.monotonic() - start:.1f} s")
    return sum_tensor_over_ranks(whole)


def _dialogues(example: Example) -> list[Dialogue]:
    return example.row.dialogues + ([example.unrelated] if example.unrelated else [])


def _key(rows: Sequence[Choice], options: DirectOptions, zero: dict[str, Any]) -> str:
    """A name made of all that decides what is read: weights, precision, tokens, and how they are read."""
    parts = [
        _weights(options.reference_model_name_or_path or options.model_name_or_path),
        [zero.get(precision, {}).get("enabled") for precision in ("bf16", "fp16")],
        rows.digest if isinstance(rows, Examples) else [*map(list, rows)],
        None if options.is_paired else [options.seed, options.max_length],
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


def _keep(file: Path, logprobs: np.ndarray) -> None:
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as content:
            np.save(content, logprobs)
            content.flush()
            os.fsync(content.fileno())
        beside.rename(file)
        flush_folder(file.parent)
    except OSError as error:
        log(f"{file}: not kept: {error}")
        beside.unlink(missing_ok=True)
