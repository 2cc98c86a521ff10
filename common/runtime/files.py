"""Files that are whole or absent: atomic writes, checksums, free space, and the lock of a folder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any, TextIO

from common.runtime.distributed import log
from common.runtime.options import UserError, reason

CHUNK = 1 << 22  # bytes read at once
UMASK = os.umask(0o077)  # what this process was started with; it can be read by setting it only
os.umask(UMASK)


# The same methods of Path raise OSError for a name that is too long, and in a forbidden folder.
def exists(path: str | Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110


def is_folder(path: str | Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113


def is_no_hub_name(name: str) -> bool:
    """Whether a name can only be that of a file or folder."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file beside its place, flush it to disk, and rename it into place."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Like `write_json`, for text."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    flush_folder(path.parent)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: not a model folder: {file.name} is missing") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not read: {reason(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold one JSON object")
    return values


def make_folder(option: str, path: str) -> Path:
    """The folder that an option names, made if it is not there. Raises UserError when it cannot be had."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--{option} {path}: {error.strerror}") from None
    return Path(path)


def flush_file(path: Path) -> None:
    """Have the disk hold what a library wrote, with the mode that the umask gives a new file: some libraries
    write through a temporary file that only its owner can read.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # a file system without modes
        path.chmod(0o666 & ~UMASK)


def flush_folder(path: Path) -> None:
    """Have the disk hold the names in a folder: a rename is not safe before that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Checksum of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder; 0 when there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def lock_folder(folder: Path) -> TextIO:
    """Claim a folder for this process: for as long as the returned file stays open, or the process lives.

    The system gives the lock up when its holder dies, so a stale one cannot exist. Raises UserError, naming
    the holder, when another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "run.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"--output_dir {folder}: in use by {file.read().strip()}; stop that run or choose another folder"
        ) from None
    except OSError as error:
        log(f"--output_dir {folder}: cannot be locked ({error}); see to it that only one run uses it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
