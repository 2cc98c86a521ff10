"""Check and read the weights of model folders and hub names, through transformers.

Custom code is never run, and from PyTorch files only tensors are loaded.
"""

import pickle
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from common.model import varlen_attention
from common.model.deepspeed_internals import full_shape, is_partitioned, local_values
from common.model.generation_config import read_generation_config, writable
from common.model.model_config import Kind, custom_code, read_config
from common.runtime.distributed import first_few, gather_objects, log_once
from common.runtime.files import read_json
from common.runtime.options import UserError, reason
from common.text.transformers_internals import supports_kind, weight_files

LAYER = re.compile(r"^.*?\.\d+(?=\.)")  # the layer's part of a weight's name
LFS = b"version https://git-lfs"  # start of a pointer to a file that is not fetched yet


class Comparison(NamedTuple):
    """Weights in the files compared with those of the model."""

    missing: set[str]
    mismatched: list[str]  # names, with both shapes
    unexpected: list[str]
    prefix: str  # of the backbone's names


def check_weights(kind: Kind, path: str, new_head: bool = False) -> None:
    """Compare names and shapes of the weights in the files with the model's; no values are read.

    new_head: the model gets a new head, so its own may be missing, and the files may hold another. Raises
    UserError when any other weight is missing or has another shape. Unexpected weights get a warning.
    """
    compared = _compare(kind, path)
    missing, unexpected = sorted(compared.missing), compared.unexpected
    if new_head:
        missing, unexpected = (
            [name for name in names if name.startswith(f"{compared.prefix}.")]
            for names in (missing, unexpected)
        )
    if missing:
        raise UserError(f"{path}: weights are missing: {first_few(missing)}")
    if compared.mismatched:
        raise UserError(f"{path}: config.json asks for other shapes: {first_few(compared.mismatched)}")
    if unexpected:
        log_once(
            f"warning: {path}: ignored {len(unexpected)} weights that the model does not use:"
            f" {', '.join(unexpected[:3])}{', ...' if len(unexpected) > 3 else ''}"
        )


def check_attention(kernels: str) -> None:
    """Raise UserError for attention kernels that this machine lacks."""
    if kernels == "varlen" and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    ):
        raise UserError(
            "--attn_implementation varlen: needs an NVIDIA GPU of compute capability 8.0 or above"
        )
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    has = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if kernels in has and not has[kernels]():
        package = "flash-attn" if kernels == "flash_attention_2" else "flash_attn_3"
        raise UserError(f"--attn_implementation {kernels}: needs a GPU, and pip install {package}")


def read_weights(
    kind: Kind, path: str, config: PretrainedConfig, dtype: torch.dtype, attention: str = "auto"
) -> PreTrainedModel:
    """Load the model with its weights; at ZeRO-3 each rank loads its partition. attention: kernels."""
    if attention == "varlen":
        varlen_attention.register()
        attention = "sdpa"
    kernels = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        model = kind.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=False, weights_only=True,
            generation_config=read_generation_config(path, config), **kernels,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - the files may hold anything
        raise UserError(f"{path}: {_read_error(error)}") from None
    if model.can_generate():
        model.generation_config = writable(model.generation_config, path)
    return model


def check_values(model: PreTrainedModel, path: str) -> None:
    """Raise UserError, on all ranks, for a weight with NaN or Inf, and for all-zero layers or embeddings.

    Partitions on NVMe are not checked. Other all-zero matrices only get a warning: added layers may start
    with a few of them.
    """
    weights = {id(weight): (name, weight) for name, weight in model.state_dict(keep_vars=True).items()}
    named = [(name, weight) for name, weight in weights.values() if weight.is_floating_point()]
    ranges = [_range(weight) for _, weight in named]
    bad = {i for i, (is_finite, _) in enumerate(ranges) if not is_finite}
    zeros = {i for i, (_, is_zero) in enumerate(ranges) if is_zero}
    embeddings = model.get_input_embeddings().weight
    if is_partitioned(embeddings):
        bad_by_rank, zeros_by_rank = zip(*gather_objects((bad, zeros)), strict=True)
        bad, zeros = set.union(*bad_by_rank), set.intersection(*zeros_by_rank)
    if bad:
        name, weight = named[min(bad)]
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{path}: weight {name} holds NaN or Inf (as {dtype}); the file is damaged")
    layers = ["embeddings" if w is embeddings else "".join(LAYER.findall(name)) for name, w in named]
    nonzero = {layer for i, layer in enumerate(layers) if i not in zeros}
    matrices = [i for i in sorted(zeros) if len(full_shape(named[i][1])) > 1]
    if layer := next((layers[i] for i in matrices if layers[i] and layers[i] not in nonzero), None):
        raise UserError(f"{path}: {layer}: all zeros; the file is damaged")
    names = [named[i][0] for i in matrices if named[i][0] != "score.weight"]  # a critic's may be 0
    if names:
        log_once(f"warning: {path}: weights are all zeros, the file may be damaged: {first_few(names)}")


@lru_cache
def _compare(kind: Kind, path: str) -> Comparison:
    """Compare through transformers, which knows tied, computed and renamed weights, on the meta device.

    Loading at ZeRO-3 reports only some of the differences, and not on every rank.
    """
    config = read_config(path)
    config.num_labels = 1
    if not supports_kind(kind, config):
        role = kind.__name__.removeprefix("AutoModelFor")
        raise UserError(
            f"{path}: {custom_code(path, kind) or f'transformers has no {role} for {config.model_type}'}"
        )
    state: dict[str, Tensor] = {}
    for file in _weight_files(path, config):
        try:
            state |= load_state_dict(file, map_location="meta")
        except FileNotFoundError:
            raise UserError(f"{file}: missing, but named in the index of the weights") from None
        except Exception as error:  # noqa: BLE001 - the file may hold anything
            raise UserError(f"{file}: {_read_error(error, Path(file))}") from None
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
        _, info = type(model).from_pretrained(
            None, config=model.config, state_dict=state, device_map="meta", dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - the configuration may hold anything
        raise UserError(
            f"{Path(path) / 'config.json'}: cannot build a model from it: {reason(error)}"
        ) from None
    mismatched = [f"{n} is {tuple(has)}, not {tuple(wants)}" for n, has, wants in info["mismatched_keys"]]
    unexpected = sorted(info["unexpected_keys"])
    return Comparison(info["missing_keys"], sorted(mismatched), unexpected, model.base_model_prefix)


def _weight_files(path: str, config: PretrainedConfig) -> Iterable[str]:
    """Weight files that transformers would load."""
    try:
        return weight_files(path, config)
    except Exception as error:  # noqa: BLE001 - the folder may hold anything
        for index in Path(path).glob("*.index.json"):
            if not isinstance(read_json(index).get("weight_map"), dict):
                raise UserError(f"{index}: has no `weight_map` from weights to files") from None
            if not isinstance(error, OSError):
                raise UserError(f"{index}: not an index of weights: {reason(error)}") from None
        raise UserError(f"{path}: {reason(error)}") from None


def _read_error(error: Exception, file: Path | None = None) -> str:
    start = b"-"
    if file:
        with file.open("rb") as opened:
            start = opened.read(len(LFS))
    if not start:
        return "is empty"
    if start == LFS:
        return "is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder"
    if isinstance(error, pickle.UnpicklingError):
        return "not read: truncated, or not only tensors; code in it is not run; give safetensors"
    return f"not read: {reason(error)}"


def _range(weight: Tensor) -> tuple[bool, bool]:
    """Whether this rank's part of a weight is finite, and whether it is all zeros."""
    values = local_values(weight)
    if not values.numel():
        return True, True
    low, high = torch.aminmax(values)  # ten times as fast as isfinite; propagates NaN
    return bool(low.isfinite() and high.isfinite()), bool(low == high == 0)
