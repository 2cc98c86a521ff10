"""Files: atomic writes, checksums, free space, folder locks."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.runtime.distributed import log
from common.runtime.options import UserError, reason
from common.runtime.process import on_refusal

CHUNK = 1 << 22  # bytes read at once
UMASK = os.umask(0o077)  # of this process; reading it requires setting it
os.umask(UMASK)


# The methods of Path raise OSError for a name that is too long and for a folder without permission.
def exists(path: str | Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110


def is_folder(path: str | Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113


def is_local_path(name: str) -> bool:
    """Whether a name can only be a local path, not a hub name."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: write a temporary file, flush it to disk, rename it."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, like `write_json`."""
    with replacing(path) as file:
        file.write(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write to a temporary file that replaces `path` at the end of the `with` block."""
    temporary = path.with_name(path.name + ".tmp")
    if exists(path) and not is_file(path):  # root could replace /dev/null by a file
        raise OSError(errno.EEXIST, "is there, and not a file", str(path))
    try:
        with naming(path):
            try:
                file = temporary.open("w")
            except FileNotFoundError:
                # A wrong folder of the user. Elsewhere a missing file is an error of the suite.
                raise PermissionError(errno.EACCES, f"no file can be written in {path.parent}") from None
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def append_text(path: Path, text: str) -> None:
    """Append to a text file and flush it to disk."""
    with naming(path), path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager: an OSError in its block without the name of another file gets that of this one.

    A full disk gives none.
    """
    try:
        yield
    except OSError as error:
        if str(error.filename or path).startswith(str(path)):  # also of its temporary file
            error.filename, error.filename2 = str(path), None
        raise


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder or a run. Raises UserError."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file.parent}: not a model folder: {file.name} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable: {reason(error)}") from None
    return parse_json(text, file)


def parse_json(text: str, file: Path, unique: bool = False) -> dict[str, Any]:
    """Parse the text of a file that holds one JSON object. Raises UserError.

    unique: also for a key that an object has twice.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats if unique else None)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{file}: objects or lists are nested too deep") from None
    except ValueError as error:
        raise UserError(f"{file}: not readable: {reason(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold one JSON object")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")
    return values


def make_folder(option: str, path: str) -> Path:
    """Create the folder of an option if it is missing; a refused run removes it again.

    Raises UserError if it is not writable.
    """
    missing = [folder for folder in (Path(path), *Path(path).parents) if not exists(folder)]
    on_refusal(lambda: [folder.rmdir() for folder in missing])  # fails for a folder with files
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--{option} {path}: {error.strerror}") from None
    return Path(path)


def flush_file(path: Path) -> None:
    """Flush a file that a library has written, and give it the default mode of new files.

    Some libraries write through a temporary file that only its owner can read.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
    with contextlib.suppress(OSError):  # a file system without modes
        path.chmod(0o666 & ~UMASK)


def flush_folder(path: Path) -> None:
    """Flush the directory entries of a folder, so that a rename survives a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Total size of all files below a folder; 0 for a missing folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def lock_folder(folder: Path) -> TextIO:
    """Lock a folder for this process, until the returned file is closed or the process ends.

    The system releases the lock when the process dies, so there are no stale locks. Raises UserError with
    the name of the process that holds the lock.
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
        log(f"--output_dir {folder}: cannot be locked ({error}); make sure that only one run uses it")
    with contextlib.suppress(OSError):  # a full disk, which the next file names
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[bool]:
    """Hold a lock; log a line while another process has it. Yields false where files cannot be locked."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_lock = True
        except BlockingIOError:
            log(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
            has_lock = True
        except OSError:
            has_lock = False
        yield has_lock
