"""Load a checkpoint into engines; on another number of ranks as a DeepSpeed universal checkpoint."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from common.model.deepspeed_internals import is_partitioned, universal_loading, update_master_weights
from common.model.engine import is_partial
from common.model.engine_protocol import Engine
from common.runtime.distributed import gather_objects, log, rank
from common.runtime.files import flush_folder
from common.runtime.options import RunOptions, UserError, world_size
from common.runtime.patience import patience
from common.training.checkpoint import Checkpoint, engine_settings
from common.training.train_state import TrainState


@patience()
def resume(
    checkpoint: Checkpoint | None, options: RunOptions, engines: dict[str, Engine], total_steps: int
) -> TrainState:
    """Load a checkpoint into the engines and return its state; a new state without a checkpoint.

    Raises UserError when the optimiser state does not fit the engines, except with --resume_weights_only.
    """
    if checkpoint is None:
        return TrainState(total_steps=total_steps)
    if options.resume_weights_only:
        for name, engine in engines.items():
            _load_weights(checkpoint, name, engine)
            _follow_schedule(engine)
        log(f"resumed weights from {checkpoint.folder} at step {checkpoint.state.step}; new optimiser state")
        return _set_total_steps(checkpoint.state, options, total_steps)
    for name, engine in engines.items():
        _check_fit(checkpoint, name, engine)
    for name, engine in engines.items():
        if engine.zero_optimization_stage() and checkpoint.manifest["world_size"] != world_size():
            _load_on_other_ranks(checkpoint, name, engine)
        else:
            engine.load_checkpoint(
                str(checkpoint.folder), tag=name, load_module_strict=not is_partial(engine)
            )
        _follow_schedule(engine)
    log(f"resumed from {checkpoint.folder} at step {checkpoint.state.step}")
    return _set_total_steps(checkpoint.state, options, total_steps)


def _set_total_steps(state: TrainState, options: RunOptions, total_steps: int) -> TrainState:
    """Set the state's total number of steps, and log a change."""
    if state.total_steps not in (0, total_steps) and not options.export_only:
        line = f"the run now ends at step {total_steps} instead of {state.total_steps}"
        if state.step < total_steps and options.lr_scheduler_type != "constant":
            line += f"; from step {state.step + 1} on the learning rate follows a schedule of"
            line += f" {total_steps} steps"
        log(line)
    state.total_steps = total_steps
    return state


def _check_fit(checkpoint: Checkpoint, name: str, engine: Any) -> None:
    saved, now = checkpoint.manifest["models"].get(name, {}), engine_settings(engine)
    stages = saved.get("zero_stage"), now["zero_stage"]
    precisions = saved.get("precision"), now["precision"]
    if (stages[0] != stages[1] and set(stages) != {1, 2}) or precisions[0] != precisions[1]:
        raise UserError(
            f"{checkpoint.folder}: the optimiser state of {name} is from ZeRO stage {stages[0]} in"
            f" {precisions[0]}, this run is at stage {stages[1]} in {precisions[1]}; allowed: the same, or a"
            " change between stages 1 and 2; use --resume_weights_only to resume without optimiser state"
        )
    if saved.get("layout") != now["layout"]:
        raise UserError(
            f"{checkpoint.folder}: {name} was trained with other zero_optimization settings:"
            f" {saved.get('layout')}, not {now['layout']}; restore them, or use --resume_weights_only"
        )


def _load_on_other_ranks(checkpoint: Checkpoint, name: str, engine: Any) -> None:
    """Load a partitioned optimiser saved with another number of ranks."""
    ranks = checkpoint.manifest["world_size"]
    universal = checkpoint.folder / f"{name}.universal"
    problem = ""
    if rank() == 0 and not universal.exists():
        log(f"converting {checkpoint.folder / name} from {ranks} to any number of ranks")
        problem = _convert(checkpoint.folder / name, universal)
    if problem := gather_objects(problem)[0]:
        raise UserError(f"{checkpoint.folder}: not converted from {ranks} to {world_size()} ranks: {problem}")
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    with universal_loading(engine):
        engine.load_checkpoint(
            str(checkpoint.folder), tag=universal.name, load_module_strict=not is_partial(engine)
        )
    # DeepSpeed gives all groups the settings of the first, and at stage 3 all weights share one step counter,
    # which every weight would then increment. It leaves counters on the CPU, which fused AdamW refuses.
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    own_step_counters(engine.optimizer)


def own_step_counters(optimizer: torch.optim.Optimizer) -> None:
    """Give each weight a step counter of its own, on its device."""
    for weight, moments in optimizer.state.items():
        if torch.is_tensor(moments.get("step")):
            moments["step"] = moments["step"].to(weight.device, copy=True)


def _convert(source: Path, universal: Path) -> str:
    """Convert to a universal checkpoint, through a temporary folder; returns the last line of an error."""
    temporary = universal.with_name(universal.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(source), "--output_folder", str(temporary)]
    process = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)
    if process.returncode:
        shutil.rmtree(temporary, ignore_errors=True)
        return (process.stderr.strip().splitlines() or ["no message"])[-1]
    temporary.rename(universal)
    flush_folder(universal.parent)
    return ""


def _load_weights(checkpoint: Checkpoint, name: str, engine: Engine) -> None:
    """Load the trained weights and the schedule's position into a new engine of any stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = checkpoint.folder / name
    states = torch.load(next(folder.glob("*model_states.pt")), map_location="cpu", weights_only=True)
    trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    has_weights = rank() == 0 or not any(is_partitioned(p) for _, p in trained)
    weights = states["module"]
    if checkpoint.manifest["models"][name]["zero_stage"] and has_weights:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder), tag=name)
    for parameter_name, parameter in trained:
        partitioned = is_partitioned(parameter)
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned),
        ):
            if has_weights:
                parameter.copy_(weights[parameter_name])
    update_master_weights(engine.optimizer)
    engine.lr_scheduler.load_state_dict(states["lr_scheduler"])


def _follow_schedule(engine: Engine) -> None:
    """Set the learning rates of the next step by this run's schedule.

    The saved rates belong to the number of steps that was planned when the checkpoint was written.
    """
    schedule = engine.lr_scheduler
    groups = zip(engine.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base_rate, factor_at in groups:
        group["lr"] = base_rate * factor_at(schedule.last_epoch)
