"""Checkpoints: folders that are complete or absent, from which a run goes on exactly where it was.

    output_dir/checkpoints/step_000100/    a DeepSpeed folder per trained model
        manifest.json                      sizes and checksums of its files, ranks, ZeRO stages, precision
        options.json                       the resolved options
        state.json                         step, position, controllers: `TrainState`
        average.safetensors                its averaged weights, where there are any

A checkpoint is written beside its place, flushed to disk and renamed into it.
"""

import json
import re
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.model.engine import is_partial, trained_state_dict
from common.runtime.distributed import barrier, gather_objects, log, rank
from common.runtime.files import flush_file, flush_folder, folder_bytes, free_bytes, sha256, write_json
from common.runtime.option_checks import resolved
from common.runtime.options import RunOptions, UserError, reason, world_size
from common.training.train_state import TrainState

AVERAGE = "average.safetensors"


class Checkpoint(NamedTuple):
    """A checkpoint folder that was found complete."""

    folder: Path
    manifest: dict[str, Any]
    state: TrainState


class _Writer(TorchCheckpointEngine):
    """Writes for DeepSpeed, keeps checksums, and remembers an error instead of raising it.

    DeepSpeed meets in barriers after writing: a rank whose disk is full must still come to them.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.zipfile_serialization = True  # which DeepSpeed's own tools read in parts
        self.root, self.files, self.error = root, {}, ""

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
            flush_file(Path(path))
            self.files[str(Path(path).relative_to(self.root))] = _entry(Path(path))
        except (OSError, RuntimeError) as error:
            self.error = reason(error)


def save_checkpoint(options: RunOptions, state: TrainState, engines: dict[str, Any]) -> bool:
    """Write checkpoints/step_N and delete the oldest beyond --save_total_limit. Every rank must call it.

    False when the disk would not take it: that is logged, its rest is removed, the older ones stay.
    """
    start = time.perf_counter()
    final = checkpoint_folder(options, state)
    temporary = final.with_suffix(".tmp")
    problem = ""
    if rank() == 0:
        problem = _make_room(final.parent, temporary, list(engines))
    if not (problem := _first(problem)):
        files, problem = _write_engines(temporary, engines)
    if not problem and rank() == 0:
        problem = _complete(temporary, final, options, state, _manifest(engines, files))
    if problem := _first(problem):
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        log(f"checkpoint of step {state.step} NOT saved: {problem}; training goes on, older checkpoints stay")
        return False
    if rank() == 0:
        _delete_old(options, state)
    barrier()
    log(f"saved {final} in {time.perf_counter() - start:.2f} s")
    return True


def checkpoint_folder(options: RunOptions, state: TrainState) -> Path:
    """Where the checkpoint of the state's step is, or will be."""
    return Path(options.output_dir) / "checkpoints" / f"step_{state.step:06}"


def find_checkpoint(options: RunOptions) -> Checkpoint | None:
    """The checkpoint that --resume_from_checkpoint names, the same on every rank; None: start anew.

    Of the newest ones that are damaged it says so, and takes the one before. Raises UserError when a named
    one is not complete, and when there is none to be exported.
    """
    chosen = options.resume_from_checkpoint
    folders = [] if chosen == "none" else [Path(chosen)]
    if chosen == "latest":
        folders = _first(list_checkpoints(Path(options.output_dir))[::-1])
    for folder in folders:
        if not (problem := _damage(folder)):
            manifest, state = (json.loads((folder / f"{n}.json").read_text()) for n in ("manifest", "state"))
            average = load_file(folder / AVERAGE) if rank() == 0 and AVERAGE in manifest["files"] else {}
            return Checkpoint(folder, manifest, TrainState(**state, average=average))
        if chosen != "latest":
            raise UserError(f"--resume_from_checkpoint {folder}: not a complete checkpoint: {problem}")
        log(f"{folder} is damaged ({problem}): using the one before")
    if options.export_only or options.resume_weights_only:
        raise UserError(f"--output_dir {options.output_dir}: holds no complete checkpoint")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints by their names, oldest first. Other names, as of copies, do not count."""
    folders = (output_dir / "checkpoints").glob("step_*")
    named = [folder for folder in folders if re.fullmatch("step_[0-9]+", folder.name)]
    return sorted((folder for folder in named if (folder / "state.json").exists()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def engine_settings(engine: Any) -> dict[str, Any]:
    """What must be the same, or nearly, where the engine's files are to be read again."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
    layout = {"round_robin_gradients": engine.zero_round_robin_gradients()}
    if engine.zero_optimization_stage() == 3:
        layout["sub_group_size"] = engine.zero_sub_group_size()
    return {"zero_stage": engine.zero_optimization_stage(), "precision": precision, "layout": layout}


def _make_room(root: Path, temporary: Path, names: list[str]) -> str:
    """Empty folders to write to; the problem, if there is one."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in names:
            (temporary / name).mkdir(parents=True)
        last = max(map(folder_bytes, list_checkpoints(root.parent)), default=0)
        if (free := free_bytes(root)) < last:
            return f"{free / 2**20:.1f} MiB free, the last one took {last / 2**20:.1f} MiB"
    except OSError as error:
        return str(error)
    return ""


def _write_engines(temporary: Path, engines: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Every rank's part of every engine: names, sizes and checksums of all files, and the first problem."""
    writer = _Writer(temporary)
    for name, engine in engines.items():
        engine.checkpoint_engine, before = writer, engine.checkpoint_engine
        engine._copy_recovery_script = lambda _: None  # it would raise on rank 0 alone when the disk is full
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


def _complete(
    temporary: Path, final: Path, options: RunOptions, state: TrainState, manifest: dict[str, Any]
) -> str:
    """Write what rank 0 knows, and give the folder its name; the problem, if there is one."""
    try:
        write_json(temporary / "options.json", resolved(options))
        manifest["files"]["options.json"] = _entry(temporary / "options.json")
        if state.average:
            save_file(state.average, temporary / AVERAGE)
            flush_file(temporary / AVERAGE)
            manifest["files"][AVERAGE] = _entry(temporary / AVERAGE)
        write_json(temporary / "manifest.json", manifest)
        write_json(temporary / "state.json", state.plain())
        for folder in [*filter(Path.is_dir, temporary.iterdir()), temporary]:
            flush_folder(folder)
        shutil.rmtree(final, ignore_errors=True)  # one that was damaged, or is repeated
        temporary.rename(final)
        flush_folder(final.parent)
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _delete_old(options: RunOptions, state: TrainState) -> None:
    """Delete what is beyond the limit, and the later steps of a run that went on from an earlier one."""
    folders = list_checkpoints(Path(options.output_dir))
    later = [folder for folder in folders if _step_of(folder) > state.step]
    limit = options.save_total_limit or len(folders)
    too_old = [folder for folder in folders if folder not in later][:-limit]
    for folder in later + too_old:
        if _step_of(folder) != state.best_step:
            shutil.rmtree(folder, ignore_errors=True)


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or nothing; every rank checks a part of the files."""
    problem = ""
    try:
        TrainState(**json.loads((folder / "state.json").read_text()))
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name in sorted(files)[rank() :: world_size()]:
            path = folder / name
            if not path.exists():
                problem = f"{name} is missing"
            elif path.stat().st_size != files[name]["bytes"]:
                problem = f"{name} has {path.stat().st_size} bytes, not {files[name]['bytes']}"
            elif sha256(path) != files[name]["sha256"]:
                problem = f"{name} has another checksum"
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"state.json or manifest.json: {error}"
    return _first(problem)


def _first(value: Any) -> Any:
    """The first of the ranks' values that says something, on every rank."""
    values = gather_objects(value)
    return next((v for v in values if v), values[0])
