"""Names of data sources: a file, folder or hub dataset, with an optional split and weight.

F.jsonl  F.jsonl:0.3  FOLDER  FOLDER:test  user/name  user/name:train_sft  user/name:config:split:0.5
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from common.runtime.distributed import log
from common.runtime.files import exists, is_file, is_folder, is_local_path
from common.runtime.options import UserError, reason

KINDS = (".jsonl", ".json", ".csv", ".parquet")
# Files without records, written by libraries and by runs.
METADATA = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "options.json",
    "fingerprint.json", "report.json",
)  # fmt: skip
CLICKS = ".clicks.jsonl"  # log of the annotation page, not records
LARGEST_WEIGHT = 100
# Words for splits in file names, as on the hub.
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # train_sft-00000-of-00003-0a1b2c.parquet
MOST_NAMES = 8  # file names in a log line


class Source(NamedTuple):
    """A file, folder or hub dataset. weight: how often its records are seen per epoch."""

    name: str
    weight: float = 1.0
    split: str = ""
    config: str = ""  # of a hub dataset with several configs


def parse_source(text: str) -> Source:
    """Parse a source from the command line. Raises UserError."""
    name, parts = text, []
    while ":" in name and not _is_local(name):
        name, _, part = name.rpartition(":")
        parts.insert(0, part)
    weight = 1.0
    if parts and _as_number(parts[-1]) is not None:
        weight = _as_number(parts.pop())
        if not 0 < weight <= LARGEST_WEIGHT:  # also rejects NaN
            raise UserError(
                f"{text}: the weight after the colon must be above 0 and at most {LARGEST_WEIGHT}"
            )
    if parts and kind_of(name) in KINDS and not is_folder(name):
        raise UserError(f"{text}: only a weight may follow the name of a file, as in {name}:0.3")
    if len(parts) > 2 or not all(parts):
        raise UserError(
            f"{text}: must be NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, each optionally with :WEIGHT"
        )
    config, split = ["", "", *parts][-2:]
    return Source(name, weight, SPLIT_WORDS.get(split, split) if is_folder(name) else split, config)


def repetitions(weight: float, fraction: Any) -> Any:
    """Number of repetitions of a record, from its fraction in [0, 1), or of an array of records."""
    times, rest = divmod(weight, 1)
    return int(times) + (fraction < rest)


def kind_of(name: str) -> str:
    """Suffix of a file name in lower case, such as .jsonl."""
    return Path(name).suffix.lower()


def files_of(source: Source, is_training: bool = True) -> list[str]:
    """Sorted files of a source; for a hub dataset, its name with one split.

    If there are several splits and none is named, training uses `train`, and held-out data raises UserError.
    Raises UserError for missing files and splits.
    """
    path = Path(source.name)
    if is_folder(path):
        return _files_in(source, is_training)
    kind = kind_of(source.name)
    if exists(path) or kind[1:].isalpha():
        if kind not in KINDS:
            raise UserError(
                f"{source.name}: unknown kind of data file; allowed: {' '.join(KINDS)}, a folder of these, or"
                " a hub name"
            )
        if not exists(path):
            raise UserError(f"{source.name}: No such file")
        return [source.name]
    if is_local_path(source.name):
        raise UserError(f"{source.name}: No such file or folder")
    # A named split may be cached by `datasets`, so do not ask the hub for the list of splits.
    split = source.split or _choose(source, hub_splits(source.name, source.config), is_training)
    return [":".join(filter(None, (source.name, source.config, split)))]


def files_to_read(source: Source, is_training: bool = True) -> list[str]:
    """Like `files_of`, but logs the files of a folder and the split of a hub dataset."""
    files, path = files_of(source, is_training), Path(source.name)
    if is_folder(path):
        others = [str(file) for file in _data_files(path) if str(file) not in files]
        rest = f"; not reading {_listed(others)}" if others else ""
        log(f"{source.name}: reading {_listed(files)}{rest}")
    elif files != [source.name]:
        log(f"{source.name}: reading {files[0]} from the hub")
    return files


@lru_cache
def hub_splits(name: str, config: str) -> tuple[str, ...]:
    """Splits of a hub dataset. Raises UserError with the reason if it cannot be loaded."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # would print a warning for each retry
    try:
        return tuple(datasets.get_dataset_split_names(name, config or None))
    except Exception as error:  # noqa: BLE001 - its loaders raise anything; the user needs the reason
        raise UserError(
            f"{name}: not a local file or folder, and not loadable from the hub: {hub_reason(error)}"
        ) from None


def hub_reason(error: Exception) -> str:
    """Why a hub dataset cannot be loaded: all lines of the error message, joined."""
    return " ".join(str(error).split())[:300] or reason(error)


def _is_local(name: str) -> bool:
    return kind_of(name) in KINDS or exists(name)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _files_in(source: Source, is_training: bool) -> list[str]:
    path = Path(source.name)
    by_split: dict[str, list[str]] = {}
    try:
        files = _data_files(path)
        for file in files:
            by_split.setdefault(_split_of(file.relative_to(path)), []).append(str(file))
    except OSError as error:
        raise UserError(f"{source.name}: {error.strerror}") from None
    if not by_split:
        raise UserError(f"{source.name}: a folder without data files; allowed: {' '.join(KINDS)}")
    if source.config:
        raise UserError(f"{source.name}:{source.config}:{source.split}: a folder has splits, but no configs")
    if same := [str(file) for file in files if SPLIT_WORDS.get(file.stem, file.stem) == source.split]:
        return same
    splits = sorted(filter(None, by_split))
    if not source.split and set(splits) <= {"train"}:
        return sorted(file for files in by_split.values() for file in files)
    if not source.split and is_training and "" in by_split:
        return sorted(by_split[""] + by_split.get("train", []))
    return by_split[_choose(source, splits, is_training)]


def _data_files(folder: Path) -> list[Path]:
    """Data files of a folder or else of its subfolders `data`, `train`, `test`, ..., as on the hub."""
    parts = {"data", *SPLIT_WORDS}
    inner = [path for path in folder.iterdir() if path.name.lower() in parts and is_folder(path)]
    for folders in ([folder], inner):
        files = [file for path in folders for file in path.iterdir() if _is_data(file)]
        if files:
            return sorted(files)
    return []


def _is_data(file: Path) -> bool:
    has_data_name = (
        kind_of(file.name) in KINDS and not file.name.startswith(".") and file.name not in METADATA
    )
    return has_data_name and not file.name.endswith(CLICKS) and is_file(file)


def _split_of(file: Path) -> str:
    """Split of a file, from its name or the name of its folder; empty if unknown."""
    if shard := SHARD.match(file.name):
        return SPLIT_WORDS.get(shard[1], shard[1])
    words = re.split(r"[^a-z]+", str(file.with_suffix("")).lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _choose(source: Source, splits: Sequence[str], is_training: bool) -> str:
    """Choose a split. Raises UserError with the available ones."""
    names = ", ".join(splits)
    if source.split:
        if source.split not in splits:
            raise UserError(f"{source.name}:{source.split}: no such split; it has {names or 'none'}")
        return source.split
    if len(splits) == 1:
        return splits[0]
    if is_training and "train" in splits:
        return "train"
    example = ":".join(filter(None, (source.name, source.config, splits[-1])))
    raise UserError(f"{source.name}: has the splits {names}; name one, as in {example}")


def _listed(files: Sequence[str]) -> str:
    more = [f"and {len(files) - MOST_NAMES} more"] if len(files) > MOST_NAMES else []
    return " ".join([*(Path(file).name for file in files[:MOST_NAMES]), *more])
