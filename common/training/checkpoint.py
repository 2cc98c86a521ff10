"""Checkpoints: folders that are complete or absent, from which a run resumes exactly.

    output_dir/checkpoints/step_000100/    a DeepSpeed folder per trained model
        manifest.json                      sizes and checksums of its files, ranks, ZeRO stages, precision
        options.json                       the resolved options
        state.json                         step, position, controllers: `TrainState`
        average.safetensors                the EMA weights, with --ema_decay

A checkpoint is written to a temporary folder, flushed to disk and renamed.
"""

import json
import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.model.deepspeed_internals import skip_recovery_script
from common.model.engine import is_partial, trained_state_dict
from common.model.engine_protocol import Engine
from common.runtime.distributed import gather_objects, log, rank
from common.runtime.files import flush_file, flush_folder, folder_bytes, free_bytes, sha256, write_json
from common.runtime.option_checks import resolved
from common.runtime.options import RunOptions, UserError, reason, world_size
from common.runtime.patience import patience
from common.training.train_state import TrainState

AVERAGE = "average.safetensors"


class Checkpoint(NamedTuple):
    """A complete checkpoint folder."""

    folder: Path
    manifest: dict[str, Any]
    state: TrainState


class _Writer(TorchCheckpointEngine):
    """Checkpoint writer for DeepSpeed that records checksums, and stores an error instead of raising it.

    DeepSpeed enters barriers after writing, which a rank with a full disk must still reach.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.zipfile_serialization = True  # DeepSpeed's tools can read it in parts
        self.root, self.files, self.error = root, {}, ""

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
            flush_file(Path(path))
            self.files[str(Path(path).relative_to(self.root))] = _size_and_checksum(Path(path))
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:
            self.error = reason(error)


@patience()
def save_checkpoint(options: RunOptions, state: TrainState, engines: dict[str, Engine]) -> bool:
    """Write checkpoints/step_N and delete the oldest beyond --save_total_limit. Every rank must call it.

    On an OSError, such as a full disk, it logs the problem, removes the incomplete folder, keeps the older
    checkpoints, and returns False.
    """
    start = time.perf_counter()
    final = checkpoint_folder(options, state)
    temporary = final.with_suffix(".tmp")
    problem = ""
    if rank() == 0:
        problem = _make_room(final.parent, temporary, list(engines))
    if not (problem := _first_nonempty(problem)):
        files, problem = _write_engines(temporary, engines)
    if not problem and rank() == 0:
        problem = _finish(temporary, final, options, state, _manifest(engines, files))
    if problem := _first_nonempty(problem):
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        log(f"checkpoint of step {state.step} NOT saved: {problem}; training continues, older ones are kept")
        return False
    if rank() == 0:
        _delete_old(options, state)
    log(f"saved {final} in {time.perf_counter() - start:.2f} s")
    return True


def checkpoint_folder(options: RunOptions, state: TrainState) -> Path:
    """Folder of the checkpoint of the state's step."""
    return Path(options.output_dir) / "checkpoints" / f"step_{state.step:06}"


@patience()
def find_checkpoint(options: RunOptions) -> Checkpoint | None:
    """Find the checkpoint for --resume_from_checkpoint, the same on every rank; None: start a new run.

    'latest' skips damaged checkpoints, with a line in the log. Raises UserError when a named checkpoint is
    not complete, and when there is none to export.
    """
    chosen = options.resume_from_checkpoint
    folders = [] if chosen == "none" else [Path(chosen)]
    if chosen == "latest":
        folders = _first_nonempty(list_checkpoints(Path(options.output_dir))[::-1])
    for folder in folders:
        if not (problem := _find_damage(folder)):
            manifest, state = (json.loads((folder / f"{n}.json").read_text()) for n in ("manifest", "state"))
            average = load_file(folder / AVERAGE) if rank() == 0 and AVERAGE in manifest["files"] else {}
            return Checkpoint(folder, manifest, TrainState(**state, average=average))
        if chosen != "latest":
            raise UserError(f"--resume_from_checkpoint {folder}: not a complete checkpoint: {problem}")
        log(f"{folder} is damaged ({problem}); using the one before")
    if options.export_only or options.resume_weights_only:
        raise UserError(f"--output_dir {options.output_dir}: holds no complete checkpoint")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints named step_N, oldest first. Other names, such as those of copies, are ignored."""
    folders = (output_dir / "checkpoints").glob("step_*")
    named = [folder for folder in folders if re.fullmatch("step_[0-9]+", folder.name)]
    return sorted((folder for folder in named if (folder / "state.json").exists()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def engine_settings(engine: Any) -> dict[str, Any]:
    """Settings of an engine that must match to load its files: ZeRO stage, precision, partitioning."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    layout = {"round_robin_gradients": engine.zero_round_robin_gradients()}
    if engine.zero_optimization_stage() == 3:
        layout["sub_group_size"] = engine.zero_sub_group_size()
    return {"zero_stage": engine.zero_optimization_stage(), "precision": precision, "layout": layout}


def _make_room(root: Path, temporary: Path, names: list[str]) -> str:
    """Create empty folders and check the free space; returns the problem, or an empty string."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in names:
            (temporary / name).mkdir(parents=True)
        last = max(map(folder_bytes, list_checkpoints(root.parent)), default=0)
        if (free := free_bytes(root)) < last:
            return f"{free / 2**20:.1f} MiB free, the last checkpoint needed {last / 2**20:.1f} MiB"
    except OSError as error:
        return str(error)
    return ""


def _write_engines(temporary: Path, engines: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Save all engines on all ranks; returns sizes and checksums by file name, and the first problem."""
    writer = _Writer(temporary)
    for name, engine in engines.items():
        engine.checkpoint_engine, before = writer, engine.checkpoint_engine
        skip_recovery_script(engine)
        engine.module_state_dict = partial(trained_state_dict, engine)
        engine.save_checkpoint(
            str(temporary), tag=name, save_latest=False, exclude_frozen_parameters=is_partial(engine)
        )
        del engine.module_state_dict
        engine.checkpoint_engine = before
    parts = gather_objects((writer.files, writer.error))
    files = {name: entry for part, _ in parts for name, entry in part.items()}
    return files, next((error for _, error in parts if error), "")


def _manifest(engines: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    models = {name: engine_settings(engine) for name, engine in engines.items()}
    return {"world_size": world_size(), "models": models, "files": dict(sorted(files.items()))}


def _finish(
    temporary: Path, final: Path, options: RunOptions, state: TrainState, manifest: dict[str, Any]
) -> str:
    """Write the files of rank 0 and rename the folder; returns the problem, or an empty string."""
    try:
        write_json(temporary / "options.json", resolved(options))
        manifest["files"]["options.json"] = _size_and_checksum(temporary / "options.json")
        if state.average:
            save_file(state.average, temporary / AVERAGE)
            flush_file(temporary / AVERAGE)
            manifest["files"][AVERAGE] = _size_and_checksum(temporary / AVERAGE)
        write_json(temporary / "state.json", state.plain())
        manifest["files"]["state.json"] = _size_and_checksum(temporary / "state.json")
        write_json(temporary / "manifest.json", manifest)
        for folder in [*filter(Path.is_dir, temporary.iterdir()), temporary]:
            flush_folder(folder)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, or one of a repeated step
        temporary.rename(final)
        flush_folder(final.parent)
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def _size_and_checksum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _delete_old(options: RunOptions, state: TrainState) -> None:
    """Delete checkpoints beyond --save_total_limit, and later ones of a run resumed from an earlier step."""
    folders = list_checkpoints(Path(options.output_dir))
    later = [folder for folder in folders if _step_of(folder) > state.step]
    limit = options.save_total_limit or len(folders)
    too_old = [folder for folder in folders if folder not in later][:-limit]
    for folder in later + too_old:
        if _step_of(folder) != state.best_step:
            shutil.rmtree(folder, ignore_errors=True)


def _find_damage(folder: Path) -> str:
    """Describe the damage of a checkpoint, or an empty string; every rank checks some of the files."""
    problem = ""
    try:
        TrainState(**json.loads((folder / "state.json").read_text()))
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name in sorted(files)[rank() :: world_size()]:
            path = folder / name
            if not path.exists():
                problem = f"{name} is missing"
            elif path.stat().st_size != files[name]["bytes"]:
                problem = f"{name} has {path.stat().st_size} bytes instead of {files[name]['bytes']}"
            elif sha256(path) != files[name]["sha256"]:
                problem = f"{name} has a wrong checksum"
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except Exception as error:  # noqa: BLE001 - the files may hold anything
        problem = f"state.json or manifest.json: {error}"
    return _first_nonempty(problem)


def _first_nonempty(value: Any) -> Any:
    """First non-empty value of all ranks, on every rank; else that of rank 0."""
    values = gather_objects(value)
    return next((v for v in values if v), values[0])
