"""Export a model to a plain Hugging Face folder, such as `final/`."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.model.ema import with_ema_weights
from common.model.engine import full_state_dict
from common.model.engine_protocol import Engine
from common.model.lora import is_adapted, merge_4bit
from common.runtime.distributed import gather_objects, log, rank
from common.runtime.files import flush_file, flush_folder
from common.runtime.options import UserError, reason
from common.runtime.patience import patience

# Writes more than the model into the folder, on rank 0, and takes weights that it writes out of the state.
WriteMore = Callable[[Path, dict[str, Tensor]], None]


def export_model(*arguments: Any, **more: Any) -> None:
    """`_export`; raises UserError on all ranks when the folder cannot be written."""
    if problem := _export(*arguments, **more):
        raise UserError(f"{problem}; run the command again with --export_only")


def export_best(*arguments: Any, **more: Any) -> None:
    """`_export`; a failure is only logged, because the run can continue."""
    if problem := _export(*arguments, **more):
        log(problem)


@patience()
def _export(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, folder: Path,
    load_base: Callable[[], PreTrainedModel], average: Mapping[str, Tensor] | None = None,
    write_more: WriteMore | None = None,
) -> str:  # fmt: skip
    """Write the engine's model and the tokenizer to `folder`, through a temporary folder.

    Every rank must call it; returns the problem, or an empty string. A failure leaves the old folder.

    With adapters the folder holds the merged model, and `adapter/` the adapter in peft's format. Rank 0
    merges on the CPU, in a new copy of the model from `load_base`, so that the trained model does not change.
    average: EMA weights of rank 0, to export instead of the trained weights. write_more: see `WriteMore`.
    """
    state = full_state_dict(engine, trainable_only=is_adapted(engine.module))
    if average:
        state = with_ema_weights(state, average)
    problem = ""
    if rank() == 0:
        temporary = folder.with_name(folder.name + ".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if write_more:
                write_more(temporary, state)
            _write(engine, tokenizer, state, temporary, load_base)
            _replace(temporary, folder)
            log(f"wrote {folder}")
        except Exception as error:  # noqa: BLE001 - libraries raise anything; the checkpoint stays
            problem = f"{folder}: not written: {reason(error)}"
            shutil.rmtree(temporary, ignore_errors=True)
    return gather_objects(problem)[0]


def _write(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, state: dict[str, Any], folder: Path,
    load_base: Callable[[], PreTrainedModel],
) -> None:  # fmt: skip
    if is_adapted(engine.module):
        _save_merged(engine, state, folder, load_base())
    else:
        engine.module.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    for file in filter(Path.is_file, folder.rglob("*")):
        flush_file(file)


def _replace(temporary: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _save_merged(engine: Engine, state: dict[str, Any], folder: Path, base: PreTrainedModel) -> None:
    from peft import PeftModel

    for name in ("reward_mean", "reward_std", "is_cost_model"):
        if hasattr(engine.module.config, name):
            setattr(base.config, name, getattr(engine.module.config, name))
    engine.module.save_pretrained(folder / "adapter", state_dict=state)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    merge_4bit(adapted, engine.module)
    adapted.merge_and_unload().save_pretrained(folder)
