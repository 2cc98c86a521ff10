"""Names of data: a file, a folder or a hub dataset, perhaps one split of it, and how often it is seen.

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
# What libraries write beside data, and what a run writes into its folder.
METADATA = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "options.json",
    "fingerprint.json", "report.json",
)  # fmt: skip
CLICKS = ".clicks.jsonl"  # what raters did, beside the file of records that is made of it
LARGEST_WEIGHT = 100
# Words in file names that name a split, as the hub knows them.
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # train_sft-00000-of-00003-0a1b2c.parquet
MOST_NAMES = 8  # file names in a log line


class Source(NamedTuple):
    """A file, folder or hub dataset, and how often its records are seen per epoch."""

    name: str
    weight: float = 1.0
    split: str = ""
    config: str = ""  # of a hub dataset that has several


def parse_source(text: str) -> Source:
    """A source from the command line. UserError for a weight that makes no sense, and for too many parts."""
    name, parts = text, []
    while ":" in name and not _is_local(name):
        name, _, part = name.rpartition(":")
        parts.insert(0, part)
    weight = 1.0
    if parts and _as_number(parts[-1]) is not None:
        weight = _as_number(parts.pop())
        if not 0 < weight <= LARGEST_WEIGHT:  # NaN neither
            raise UserError(
                f"{text}: the weight after the colon must be above 0 and at most {LARGEST_WEIGHT}"
            )
    if parts and kind_of(name) in KINDS and not is_folder(name):
        raise UserError(f"{text}: only a weight may follow the name of a file, as in {name}:0.3")
    if len(parts) > 2 or not all(parts):
        raise UserError(f"{text}: must be NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, each perhaps with :WEIGHT")
    config, split = ["", "", *parts][-2:]
    return Source(name, weight, SPLIT_WORDS.get(split, split) if is_folder(name) else split, config)


def copies(weight: float, fraction: Any) -> Any:
    """How often a record is seen, by its fraction in [0, 1); element by element for an array."""
    whole, rest = divmod(weight, 1)
    return int(whole) + (fraction < rest)


def kind_of(name: str) -> str:
    """The ending of a file's name, in lower case: .jsonl."""
    return Path(name).suffix.lower()


def files_of(source: Source, is_training: bool = True) -> list[str]:
    """The files of a source, in order of their names; of a hub dataset its name with one split.

    Without a named split, training takes `train` where there are several; held-out data must name one. Raises
    UserError for what is not there.
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
    # `datasets` may have a split that is named without the network; where there is none, it lists the others.
    split = source.split or _choose(source, hub_splits(source.name, source.config), is_training)
    return [":".join(filter(None, (source.name, source.config, split)))]


def files_to_read(source: Source, is_training: bool = True) -> list[str]:
    """`files_of`, with a log line that names those of a folder, or the split of a hub dataset."""
    files, path = files_of(source, is_training), Path(source.name)
    if is_folder(path):
        others = [str(file) for file in _data_files(path) if str(file) not in files]
        rest = f"; not reading {_listed(others)}" if others else ""
        log(f"{source.name}: reading {_listed(files)}{rest}")
    elif files != [source.name]:
        log(f"{source.name}: reading {files[0]} of the hub")
    return files


@lru_cache
def hub_splits(name: str, config: str) -> tuple[str, ...]:
    """The splits of a hub dataset. Raises UserError, with the reason, when it cannot be reached."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its retries, one warning each
    try:
        return tuple(datasets.get_dataset_split_names(name, config or None))
    except Exception as error:  # noqa: BLE001 - its loaders raise anything; the user needs the reason
        raise UserError(f"{name}: no such file or folder, nor a hub dataset: {hub_reason(error)}") from None


def hub_reason(error: Exception) -> str:
    """Why a hub dataset cannot be loaded: all lines of the message as one, since later ones list names."""
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
    """The data files of a folder; where it has none, of its `data`, `train`, `test` ..., as on the hub."""
    parts = {"data", *SPLIT_WORDS}
    inner = [path for path in folder.iterdir() if path.name.lower() in parts and is_folder(path)]
    for folders in ([folder], inner):
        files = [file for place in folders for file in place.iterdir() if _is_data(file)]
        if files:
            return sorted(files)
    return []


def _is_data(file: Path) -> bool:
    is_named = kind_of(file.name) in KINDS and not file.name.startswith(".") and file.name not in METADATA
    return is_named and not file.name.endswith(CLICKS) and is_file(file)


def _split_of(file: Path) -> str:
    """The split that a file's name, or its folder's, is of; nothing where no word says so."""
    if shard := SHARD.match(file.name):
        return SPLIT_WORDS.get(shard[1], shard[1])
    words = re.split(r"[^a-z]+", str(file.with_suffix("")).lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _choose(source: Source, splits: Sequence[str], is_training: bool) -> str:
    """The split to read of those that there are. Raises UserError, with their names."""
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
