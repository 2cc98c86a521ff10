"""Compiled decoding steps: on a GPU one graph per number of rows, without the cost of launching kernels."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from common.generation.steps import DirectSteps
from common.runtime.distributed import log
from common.runtime.options import reason
from common.text.transformers_internals import mark_static

COMPILE: dict[str, Any] = {"mode": "reduce-overhead"}  # CUDA graphs where there is CUDA
COLUMN_STEP = 128  # a cache has a multiple of these columns, so that few shapes are compiled

compiled_models: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # those compared: equal?


class FixedLayer(DynamicLayer):
    """Keys and values (B, H, C, D), of which attention reads all columns; the mask hides the empty ones."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.column = keys, values, column  # column (1,): of the next token
        self.is_initialized = True
        for tensor in (keys, values, column):
            mark_static(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[: len(key_states)], self.values[: len(key_states)]
        keys.index_copy_(2, self.column, key_states)
        values.index_copy_(2, self.column, value_states)
        return keys, values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


class CompiledSteps:
    """As `DirectSteps`, with a power of two of rows; the results of those beyond the batch mean nothing."""

    def __init__(self, eager: DirectSteps, run: Any) -> None:
        self.eager, self.run = eager, run
        layers = eager.cache.layers
        self.column = torch.tensor([eager.column], device=eager.mask.device)
        self.mask = pad(eager.mask, (0, 0, 0, 0, 0, 0, 0, len(layers[0].keys) - len(eager.mask)))
        self.mask[..., eager.column :] = torch.finfo(self.mask.dtype).min
        self.cache = DynamicCache()
        self.cache.layers = [FixedLayer(layer.keys, layer.values, self.column) for layer in layers]

    def logits(self, tokens: Tensor) -> Tensor:
        """As `DirectSteps.logits`."""
        count, rows = len(tokens), bucket(len(tokens))
        self.mask.index_fill_(-1, self.column, 0.0)
        torch.compiler.cudagraph_mark_step_begin()
        logits = self.run(
            self.eager.model,
            pad(tokens, (0, rows - count))[:, None],
            self.mask[:rows],
            pad(self.eager.positions, (0, 0, 0, rows - count)),
            self.cache,
            self.eager.more,
        )
        self.column += 1
        self.eager.positions += 1
        return logits[:count]

    def select(self, order: list[int]) -> None:
        """As `DirectSteps.select`."""
        for layer, fixed in zip(self.eager.cache.layers, self.cache.layers, strict=True):
            layer.length = fixed.keys.shape[2]  # columns that move
        self.eager.select(order)
        self.mask[: len(order)] = self.mask[order]


def bucket(count: int) -> int:
    """The power of two at or above a number of rows: so few sizes are compiled or captured."""
    return 1 << (count - 1).bit_length()


def cache_size(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a cache for compiled steps; columns: those of prompts and responses."""
    return bucket(rows), (columns // COLUMN_STEP + 1) * COLUMN_STEP


def compiled_if_equal(eager: DirectSteps, tokens: Tensor) -> CompiledSteps | DirectSteps:
    """Compiled steps if their logits are those of the eager ones, else these, with a line in the log.

    tokens (b,): any, for the comparison, once for each model. What it writes is written again.
    """
    if eager.model not in compiled_models:
        problem = _try(eager, tokens)
        compiled_models[eager.model] = not problem
        if problem:
            log(f"--compile_generation: sampling is not compiled: {problem}")
    return CompiledSteps(eager, RUN) if compiled_models[eager.model] else eager


def _try(eager: DirectSteps, tokens: Tensor) -> str:
    """Compare a step; returns the problem, empty if there is none."""
    expected = eager.logits(tokens).float()
    eager.step_back()
    try:
        logits = CompiledSteps(eager, RUN).logits(tokens).float()
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways
        return reason(error)
    eager.positions -= 1
    limit = torch.finfo(eager.mask.dtype).eps ** 0.5 * expected.std()
    difference = (logits - expected).abs().max()
    return "" if difference <= limit else f"logits differ by {difference:.2g}; allowed are {limit:.2g}"


def _step(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, more: dict[str, Any]
) -> Tensor:
    """Logits (b, V) after ids (b, 1)."""
    outputs = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        return_dict=True, **more,
    )  # fmt: skip
    return outputs.logits[:, -1]


RUN = torch.compile(_step, **COMPILE)
