"""Write `final/`: a plain Hugging Face folder that transformers loads without Triptych."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.distributed import barrier, log, rank
from common.engine import full_state_dict
from common.lora import is_adapted


def export_model(
    engine: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    load_base: Callable[[], PreTrainedModel],
) -> None:
    """Write the engine's model and the tokenizer to `folder`, by way of a folder beside it. Every rank must
    call it.

    With adapters the folder holds the merged model, and `adapter/` the adapter in peft's format; the merge is
    made on rank 0, on the CPU, in a fresh copy of the model from `load_base`, so that the trained one is left
    as it is.
    """
    state = full_state_dict(engine, trainable_only=is_adapted(engine.module))
    if rank() == 0 and state is not None:
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        if is_adapted(engine.module):
            _save_merged(engine, state, temporary, load_base())
        else:
            engine.module.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    barrier()
    log(f"wrote {folder}")


def _save_merged(engine: Any, state: dict[str, Any], folder: Path, base: PreTrainedModel) -> None:
    from peft import PeftModel

    for name in ("reward_mean", "reward_std"):
        if hasattr(engine.module.config, name):
            setattr(base.config, name, getattr(engine.module.config, name))
    engine.module.save_pretrained(folder / "adapter", state_dict=state)
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder)
