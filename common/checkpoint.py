"""The directory contract: checkpoints to resume from, and `final/` for other stages and programs.

    output_dir/options.json                the resolved options
    output_dir/checkpoints/step_000100/    a DeepSpeed folder per trained model, and state.json, written last
    output_dir/final/                      a plain Hugging Face folder

A checkpoint is written beside its place and renamed into it, so a folder that has its name is complete.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.distributed import barrier, log, rank
from common.options import Options, UserError

# What may differ between a run and its continuation: paths, intervals, how much is done at once, and more
# steps.
FREE_OPTIONS = {
    "output_dir", "resume_from_checkpoint", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "max_steps", "num_train_epochs", "micro_batch_size", "generation_batch_size", "gradient_checkpointing",
    "max_eval_samples",
}  # fmt: skip


@dataclass
class TrainState:
    """Everything besides the engines that a run needs to go on exactly where it was.

    Random numbers need no state: they are a function of the seed and the step (`seed_everything`).
    """

    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    controllers: dict[str, float] = field(default_factory=dict)

    def advance(self, samples: int, examples: int) -> None:
        """Count a finished step on `samples` of a data set of `examples`."""
        self.step += 1
        self.samples += samples
        self.epoch = self.samples / examples


def prepare_output(options: Options) -> None:
    """Claim the output directory for this run and write options.json.

    Raises UserError, naming the options that differ, when the directory holds a different run, and when it
    holds any run although --resume_from_checkpoint is 'none'.
    """
    folder = Path(options.output_dir)
    known = folder / "options.json"
    current = json.loads(json.dumps(dataclasses.asdict(options)))
    if known.exists():
        if options.resume_from_checkpoint == "none":
            raise UserError(
                f"--output_dir {folder}: holds a run; choose another folder or resume from 'latest'"
            )
        earlier = json.loads(known.read_text())
        keys = [k for k in current.keys() | earlier.keys() if current.get(k) != earlier.get(k)]
        differing = sorted(set(keys) - FREE_OPTIONS)
        if differing:
            changes = ", ".join(f"--{k} {earlier.get(k)} -> {current.get(k)}" for k in differing)
            raise UserError(
                f"--output_dir {folder}: holds a different run ({changes}); choose another folder"
            )
    barrier()
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(known, current)


def resume(options: Options, engines: dict[str, Any]) -> TrainState:
    """Load the checkpoint that --resume_from_checkpoint names into the engines; a fresh state if there is
    none.

    Raises UserError when a named checkpoint is not complete.
    """
    chosen = options.resume_from_checkpoint
    if chosen == "none":
        return TrainState()
    complete = list_checkpoints(Path(options.output_dir))
    folder = (complete[-1] if complete else None) if chosen == "latest" else Path(chosen)
    if folder is None:
        return TrainState()
    if not (folder / "state.json").exists():
        raise UserError(
            f"--resume_from_checkpoint {folder}: not a complete checkpoint: state.json is missing"
        )
    for name, engine in engines.items():
        engine.load_checkpoint(str(folder), tag=name, load_module_strict=not _is_partial(engine))
    state = TrainState(**json.loads((folder / "state.json").read_text()))
    log(f"resumed from {folder} at step {state.step}")
    return state


def save_checkpoint(options: Options, state: TrainState, engines: dict[str, Any]) -> None:
    """Write checkpoints/step_N and delete the oldest beyond --save_total_limit. Every rank must call it."""
    root = Path(options.output_dir) / "checkpoints"
    final, temporary = root / f"step_{state.step:06}", root / f"step_{state.step:06}.tmp"
    if (final / "state.json").exists():
        return
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(
            str(temporary), tag=name, save_latest=False, exclude_frozen_parameters=_is_partial(engine)
        )
    barrier()
    if rank() == 0:
        _write_json(temporary / "options.json", dataclasses.asdict(options))
        _write_json(temporary / "state.json", dataclasses.asdict(state))
        temporary.rename(final)
        if options.save_total_limit:
            for old in list_checkpoints(Path(options.output_dir))[: -options.save_total_limit]:
                shutil.rmtree(old)
    barrier()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = sorted((output_dir / "checkpoints").glob("step_*"))
    return [f for f in folders if not f.name.endswith(".tmp") and (f / "state.json").exists()]


def _is_partial(engine: Any) -> bool:
    """Whether only some weights are trained, as with adapters; checkpoints then leave the frozen ones out."""
    return any(not p.requires_grad for p in engine.module.parameters())


def _write_json(path: Path, content: Any) -> None:
    beside = path.with_suffix(".json.tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)
