"""Model folders and hub names, read through transformers. What is wrong with one is a UserError of one line.

Custom code is never run, and of PyTorch files only tensors are loaded.
"""

import pickle
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import _get_resolved_checkpoint_files, load_state_dict

from common.model.generation_config import read_generation_config, writable
from common.model.model_config import Kind, custom_code, read_config
from common.runtime.distributed import gather_objects, log_once, some
from common.runtime.files import read_json
from common.runtime.options import UserError, reason

LAYER = re.compile(r"^.*?\.\d+(?=\.)")  # the layer in the name of a weight
LFS = b"version https://git-lfs"  # how a file begins that stands for another, not fetched yet


class Comparison(NamedTuple):
    """What the files hold beside what the model needs."""

    missing: set[str]
    mismatched: list[str]  # with both shapes
    unexpected: list[str]
    prefix: str  # of names in the backbone


def check_weights(kind: Kind, path: str, new_head: bool = False) -> None:
    """Compare names and shapes in the files with those of the model, without reading a value.

    new_head: the head is made anew, so that it may be absent, and another head may be there. Raises UserError
    when any other weight is absent or has another shape; weights that have no place are ignored, with a
    warning.
    """
    compared = _compare(kind, path)
    missing, unexpected = sorted(compared.missing), compared.unexpected
    if new_head:
        missing, unexpected = (
            [name for name in names if name.startswith(f"{compared.prefix}.")]
            for names in (missing, unexpected)
        )
    if missing:
        raise UserError(f"{path}: weights are missing: {some(missing)}")
    if compared.mismatched:
        raise UserError(f"{path}: config.json asks for other shapes: {some(compared.mismatched)}")
    if unexpected:
        log_once(f"warning: {path}: weights without a place in the model are ignored: {some(unexpected)}")


def read_weights(kind: Kind, path: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights; at ZeRO-3, each rank's part of them."""
    try:
        model = kind.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=False, weights_only=True,
            generation_config=read_generation_config(path, config),
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - whatever is in the files
        raise UserError(f"{path}: {_why(error)}") from None
    if model.can_generate():
        model.generation_config = writable(model.generation_config, path)
    return model


def check_values(model: PreTrainedModel, path: str) -> None:
    """Raise UserError, on every rank that holds a part, when a weight is not finite, naming the first, and
    when the embeddings or a layer are nothing but zeros. Parts that ZeRO-3 keeps on NVMe are not looked at.

    Other matrices of zeros draw a warning: some people add layers in which a few begin so.
    """
    weights = {id(weight): (name, weight) for name, weight in model.state_dict(keep_vars=True).items()}
    named = [(name, weight) for name, weight in weights.values() if weight.is_floating_point()]
    ranges = [_range(weight) for _, weight in named]
    bad = next((n for n, (is_finite, _) in enumerate(ranges) if not is_finite), len(named))
    zeros = {n for n, (_, is_zero) in enumerate(ranges) if is_zero}
    embeddings = model.get_input_embeddings().weight
    parts = gather_objects((bad, zeros)) if is_partitioned(embeddings) else [(bad, zeros)]
    bad = min(number for number, _ in parts)
    if bad < len(named):
        name, weight = named[bad]
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{path}: weight {name} holds NaN or Inf (as {dtype}); the file is damaged")
    zeros = set.intersection(*(part for _, part in parts))
    layers = ["embeddings" if weight is embeddings else "".join(LAYER.findall(n)) for n, weight in named]
    full = {layer for number, layer in enumerate(layers) if number not in zeros}
    matrices = [n for n in sorted(zeros) if len(_shape(named[n][1])) > 1]
    if empty := next((layers[n] for n in matrices if layers[n] and layers[n] not in full), None):
        raise UserError(f"{path}: {empty}: nothing but zeros; the file is damaged")
    if names := [named[n][0] for n in matrices if named[n][0] != "score.weight"]:  # a critic's may begin so
        log_once(f"warning: {path}: weights are all zeros, as in a damaged file: {some(names)}")


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds this parameter in parts."""
    return hasattr(parameter, "ds_id")


@lru_cache
def _compare(kind: Kind, path: str) -> Comparison:
    """Have transformers load tensors without values into a model without values: it knows what is tied,
    computed or renamed. At ZeRO-3 the loading itself reports only a part of it, and not to every rank.
    """
    config = read_config(path)
    config.num_labels = 1
    if type(config) not in kind._model_mapping:
        what = kind.__name__.removeprefix("AutoModelFor")
        raise UserError(
            f"{path}: {custom_code(path, kind) or f'transformers has no {what} for {config.model_type}'}"
        )
    state: dict[str, Tensor] = {}
    for file in _weight_files(path, config):
        try:
            state |= load_state_dict(file, map_location="meta")
        except FileNotFoundError:
            raise UserError(f"{file}: missing, but the index of the weights names it") from None
        except Exception as error:  # noqa: BLE001 - whatever is in the file
            raise UserError(f"{file}: {_why(error, Path(file))}") from None
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
        _, info = type(model).from_pretrained(
            None, config=model.config, state_dict=state, device_map="meta", dtype=torch.float32,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - a configuration that no model can be made of
        raise UserError(
            f"{Path(path) / 'config.json'}: no model can be made of it: {reason(error)}"
        ) from None
    mismatched = [f"{n} is {tuple(has)}, not {tuple(wants)}" for n, has, wants in info["mismatched_keys"]]
    unexpected = sorted(info["unexpected_keys"])
    return Comparison(info["missing_keys"], sorted(mismatched), unexpected, model.base_model_prefix)


def _weight_files(path: str, config: PretrainedConfig) -> Iterable[str]:
    """The files that transformers would load."""
    try:
        files, _ = _get_resolved_checkpoint_files(
            path, variant=None, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False,
            transformers_explicit_filename=getattr(config, "transformers_weights", None),
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - whatever is in the folder
        for index in Path(path).glob("*.index.json"):
            if not isinstance(read_json(index).get("weight_map"), dict):
                raise UserError(f"{index}: has no `weight_map`, which names a file for each weight") from None
            if not isinstance(error, OSError):
                raise UserError(f"{index}: no index of weights: {reason(error)}") from None
        raise UserError(f"{path}: {reason(error)}") from None
    return files


def _why(error: Exception, file: Path | None = None) -> str:
    begin = b"-"
    if file:
        with file.open("rb") as opened:
            begin = opened.read(len(LFS))
    if not begin:
        return "is empty"
    if begin == LFS:
        return "is a pointer of Git LFS, not the weights; run `git lfs pull` in its folder"
    if isinstance(error, pickle.UnpicklingError):
        return "not read: it is cut or holds more than tensors, of which code is not run; give safetensors"
    return f"not read: {reason(error)}"


def _shape(weight: Tensor) -> torch.Size:
    return weight.ds_shape if is_partitioned(weight) else weight.shape


def _range(weight: Tensor) -> tuple[bool, bool]:
    """Whether what this rank holds of a weight is finite, and whether it is all zeros."""
    values = weight.detach()
    if is_partitioned(weight):  # the last part has padding behind it
        import torch.distributed as dist

        begin = weight.ds_tensor.ds_numel * dist.get_rank(weight.ds_process_group)
        values = weight.ds_tensor.flatten()[: max(0, weight.ds_numel - begin)]
    if not values.numel():
        return True, True
    least, most = torch.aminmax(values)  # ten times as fast as isfinite, and NaN passes through
    return bool(least.isfinite() and most.isfinite()), bool(least == most == 0)
