"""Claim the output directory: for one process at a time, and for one run only."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, assert_never

from transformers import PreTrainedTokenizerFast

from common.data.sources import files_of, parse_source
from common.runtime.distributed import log, on_first_rank
from common.runtime.files import lock_folder, read_json, sha256, write_json
from common.runtime.option_checks import (
    changed_defaults,
    changed_options,
    default_values,
    free_to_change,
    resolved,
    resume_kinds,
    with_new_names,
)
from common.runtime.options import RunOptions, UserError
from common.runtime.process import on_refusal, report_accepted
from common.runtime.vllm_version import installed_version
from common.training.checkpoint import Checkpoint, find_checkpoint

ENDS = 1 << 20  # bytes at each end of a weights file that its fingerprint reads
# Log lines for files that may change before a resume, by the `resume` kind of their option.
RENEWABLE = {
    "function": "the file has changed since this run started; earlier scores came from the old one",
    "centring": "the records have changed since this run started; final/ is centred on the new ones",
}

CLAIM = ("run.lock", "options.json", "fingerprint.json")  # files that a claim writes
_locks: list[Any] = []  # held until the process ends


def check_folder(options: RunOptions) -> None:
    """Raise UserError when the output directory holds a run with other options.

    Called before data is read; `open_run` and `prepare_output` also compare the data.
    """
    folder, named = Path(options.output_dir), options.resume_from_checkpoint
    if named == "none" and (folder / "options.json").exists():
        raise UserError(f"--output_dir {folder}: holds a run; choose another folder or resume from 'latest'")
    if named not in ("none", "latest") and not Path(named).is_dir():
        raise UserError(f"--resume_from_checkpoint {named}: no such folder")
    _compare_options("--output_dir", folder, options)
    _compare_options("--resume_from_checkpoint", Path(named), options)


def open_run(
    options: RunOptions, tokenizers: dict[str, PreTrainedTokenizerFast], total_steps: int
) -> Checkpoint | None:
    """Claim the output directory for a training run; returns the checkpoint to resume from, if any.

    Works like `prepare_output`, and also raises UserError when the run is beyond `total_steps` already.
    """
    files = on_first_rank(_claim, options, tokenizers)
    checkpoint = find_checkpoint(options)
    if checkpoint and checkpoint.state.step > total_steps and not options.export_only:
        limit = f"--max_steps {options.max_steps}"
        if not options.max_steps:
            limit = f"--num_train_epochs {options.num_train_epochs:g} ({total_steps} steps)"
        step = checkpoint.state.step
        raise UserError(
            f"{limit}: the run in {options.output_dir} is at step {step} already; allowed: {step} or more,"
            " or --export_only, which writes final/ from its checkpoint"
        )
    if not options.export_only:
        on_first_rank(_write, options, files)
    report_accepted()
    return checkpoint


def prepare_output(options: RunOptions, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    """Claim the output directory for this run; every rank must call it.

    Writes options.json, and fingerprint.json with checksums of data, models, tokenizers and templates. Raises
    UserError on every rank, and writes nothing, when the directory holds a different run, when another
    process uses it, or when it holds any run and --resume_from_checkpoint is 'none'.
    """
    on_first_rank(_write, options, on_first_rank(_claim, options, tokenizers))
    report_accepted()


def fingerprint(options: RunOptions, tokenizers: dict[str, PreTrainedTokenizerFast]) -> dict[str, str]:
    """Checksums of the run's inputs: data, models, functions, tokenizers, chat templates; vLLM's version."""
    checksums = {}
    for name, kind in resume_kinds(options).items():
        value = getattr(options, name)
        if kind in ("same", "free"):
            continue
        for number, source in enumerate([value] if isinstance(value, str) else value, start=1):
            if not source:
                continue
            match kind:
                case "data" | "centring":
                    checksum = _content(source, is_training=name != "eval_data")
                case "model":
                    checksum = _weights(source)
                case "function":
                    checksum = sha256(Path(source.rpartition(".py:")[0] + ".py"))
                case _:
                    assert_never(kind)
            checksums[f"--{name} {number}"] = checksum
    for name, tokenizer in tokenizers.items():
        special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
        checksums[name] = _digest(tokenizer.backend_tokenizer.to_str() + special)
        checksums[f"chat template of the {name}"] = _digest(str(tokenizer.chat_template))
    if getattr(options, "rollout_engine", "") == "vllm":
        checksums["the version of vLLM"] = installed_version()
    return checksums


def _claim(options: RunOptions, tokenizers: dict[str, PreTrainedTokenizerFast]) -> dict[str, Any]:
    """Lock the folder and compare it with this run; returns the files to write."""
    folder = Path(options.output_dir)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    before = _file_names(folder)
    lock = lock_folder(folder)
    on_refusal(partial(_withdraw, folder, missing, before))
    checksums = fingerprint(options, tokenizers)
    check_folder(options)
    if (folder / "fingerprint.json").exists():
        _compare_data(options, read_json(folder / "fingerprint.json"), checksums)
    _locks.append(lock)
    return {"fingerprint.json": checksums, "options.json": resolved(options)}


def _write(options: RunOptions, files: dict[str, Any]) -> None:
    folder = Path(options.output_dir)
    for left_over in (folder / "checkpoints").glob("*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)
    for name, content in files.items():
        write_json(folder / name, content)


def _withdraw(folder: Path, missing: Sequence[Path], before: set[str]) -> None:
    """Remove the files and folders of a claim, unless the run has written more than empty files since."""
    added_files = [folder / name for name in _file_names(folder) - before - {"train.log"}]
    if all(file.name in CLAIM or _is_empty(file) for file in added_files):
        for file in added_files:
            file.unlink()
        for added in missing:
            added.rmdir()  # fails for a folder that is not empty


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _compare_options(name: str, folder: Path, options: RunOptions) -> None:
    """Raise UserError for options that differ from those of the run in `folder`."""
    if not (folder / "options.json").exists():
        return
    earlier = with_new_names(read_json(folder / "options.json"), options)
    current, free_options = resolved(options), free_to_change(options)
    if changes := changed_options(earlier, current, default_values(options), free_options):
        inputs = {name for name, kind in resume_kinds(options).items() if kind in ("data", "model")}
        free, paths = (
            " ".join(f"--{option}" for option in sorted(names)) for names in (free_options - inputs, inputs)
        )
        raise UserError(
            f"{name} {folder}: holds a different run ({', '.join(changes)}); choose another folder."
            f" These may differ: {free}. Of these the path, not the content: {paths}"
        )
    if renewed := changed_defaults(earlier, current, free_options):
        raise UserError(
            f"{name} {folder}: its run started with other defaults; to resume it, add {' '.join(renewed)}"
        )


def _compare_data(options: RunOptions, earlier: dict[str, str], current: dict[str, str]) -> None:
    """Raise UserError for inputs that have changed.

    A reward function may change, because users correct its file after an error. Demonstrations for centring
    may change too, because centring happens after training.
    """
    names = [n for n in {**earlier, **current} if earlier.get(n) != current.get(n)]
    kinds = resume_kinds(options)
    kind_of = {name: kinds.get(name.split()[0].lstrip("-")) for name in names}
    if refused := [_label(options, name) for name in names if kind_of[name] not in RENEWABLE]:
        verb = "has" if len(refused) == 1 else "have"
        raise UserError(
            f"--output_dir {options.output_dir}: {', '.join(refused)} {verb} changed since this run started;"
            " restore it or choose another folder"
        )
    for name in names:
        log(f"{_label(options, name)}: {RENEWABLE[kind_of[name]]}")


def _label(options: RunOptions, name: str) -> str:
    """Label of a checksum in messages: `--train_data 1` becomes `FILE (--train_data, file 1)`."""
    if not name.startswith("--"):
        return name
    option, number = name.split()
    value = getattr(options, option[2:])
    if isinstance(value, str):
        return f"{value} ({option})"
    noun = "model" if "model" in option else "file"
    if int(number) > len(value):
        return f"{noun} {number} of {option}"
    return f"{value[int(number) - 1]} ({option}, {noun} {number})"


def _content(text: str, is_training: bool) -> str:
    """Checksum of a data file or folder and its weight; for a hub dataset, of its name."""
    source = parse_source(text)
    path = Path(source.name)
    files = files_of(source, is_training) if path.is_dir() else [source.name] if path.is_file() else []
    name = ":".join(filter(None, (source.name, source.config, source.split)))
    return _digest(f"{source.weight} {[sha256(Path(file)) for file in files] or name}")


def _weights(path: str) -> str:
    """Checksum of a model folder: its configuration, and size and both ends of each weights file."""
    parts = [(Path(path) / "config.json").read_text()] if Path(path).is_dir() else [path]
    for file in sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("*.bin")):
        with file.open("rb") as content:
            beginning = content.read(ENDS)
            content.seek(max(0, file.stat().st_size - ENDS))
            parts.append(f"{file.name} {file.stat().st_size} {_digest(beginning)} {_digest(content.read())}")
    return _digest("\n".join(parts))


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
