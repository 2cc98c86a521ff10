"""What raters answered, on disk: every click in a log that only grows, and from it the records for step 2.

F.clicks.jsonl is the truth: a line per click, flushed to disk before the page moves on, undo and skips among
them. F.jsonl holds what stands after all of them, and is written anew from the log, whole.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.data.sources import CLICKS
from common.runtime.distributed import log
from common.runtime.files import write_text
from common.runtime.options import UserError
from common.text.record_formats import Record
from step2_reward.pairs import ANSWERS, Pair

CHOICES = ("A", "B", "tie", "skip", "undo")
STRENGTHS = (1, 2, 3)
EVERY = 2.0  # seconds between two writings of F.jsonl, at least


class Click(NamedTuple):
    """A line of the log."""

    id: str  # which the page made up
    time: str
    rater: str
    pair: str  # its id
    choice: str  # A: response_a of the record is better
    strength: int | None  # 1 to 3, if the rater said so
    left: str  # the response that stood on the left, A or B


Answers = dict[str, dict[str, Click]]  # by rater, then by pair: what stands, the newest last


class Store:
    """The log of one annotation, for this process alone."""

    def __init__(self, output: str, pairs: Sequence[Pair]) -> None:
        """Take up the log. Raises UserError when it is another's, in use, damaged, or cannot be had."""
        self.path, self._pairs = Path(output), {pair.id: pair for pair in pairs}
        self._file = open_log(self.path)
        clicks = read_clicks(log_of(self.path))
        check_known(clicks, self._pairs, self.path)
        self._names, self.answers = {click.id for click in clicks}, standing(clicks)
        self._lock, self._changed = threading.RLock(), threading.Event()
        self.write_preferences()

    def add(self, name: str, rater: str, pair: str, choice: str, strength: int | None, left: str) -> None:
        """Put a click on disk, once, however often it is sent. Raises OSError, with nothing changed."""
        with self._lock:
            if name in self._names:
                return
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            click = Click(name, now, rater, pair, choice, strength, left)
            end = self._file.seek(0, os.SEEK_END)
            try:
                line = f"{json.dumps(click._asdict())}\n".encode()
                while line:
                    line = line[self._file.write(line) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise
            self._names.add(name)
            apply(click, self.answers)
            self._changed.set()

    def undo(self, name: str, rater: str) -> Click | None:
        """Take the newest answer of a rater back; which it was, or None."""
        with self._lock:
            last = next(reversed(self.answers.get(rater, {}).values()), None)
            if last is None or name in self._names:
                return None
            self.add(name, rater, last.pair, "undo", None, last.left)
            return last

    def write_preferences(self) -> None:
        """Bring F.jsonl up to date."""
        with self._lock:
            records = preferences(self._pairs.values(), self.answers)
            write_text(self.path, "".join(f"{json.dumps(record)}\n" for record in records))

    def write_often(self) -> None:
        """Do that a moment after each click, for ever."""
        while True:
            self._changed.wait()
            self._changed.clear()
            try:
                self.write_preferences()
            except OSError as error:
                log(f"{self.path}: not written ({error.strerror}); the answers are in {log_of(self.path)}")
            time.sleep(EVERY)


def log_of(path: Path) -> Path:
    """F.clicks.jsonl of F.jsonl."""
    return path.with_suffix(CLICKS)


def open_log(output: Path) -> BinaryIO:
    """The log, without a last line that was not finished: its click was never confirmed. Raises UserError."""
    path = log_of(output)
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output}: must end in .jsonl, by which step 2 knows it")
    if output.exists() and not path.exists():
        raise UserError(f"--output {output}: exists and is not of this page, or its {path.name} is gone")
    try:
        file = path.open("a+b", buffering=0)  # noqa: SIM115 - open, and locked, while the process lives
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output {output}: in use by another page; stop it or choose another") from None
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log(f"{path}: its last line was not finished, and is removed")
        file.truncate(whole)
    return file


def read_clicks(path: Path) -> list[Click]:
    """The finished lines of a log. Raises UserError naming a bad one."""
    clicks = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), start=1):
        try:
            click = Click(**json.loads(line))
            texts = (click.id, click.rater, click.pair, click.choice)
            if not all(isinstance(text, str) for text in texts) or click.choice not in CHOICES:
                raise ValueError
            clicks.append(click)
        except (ValueError, TypeError):
            raise UserError(f"{path}:{number}: not a click of this page; restore the line") from None
    return clicks


def check_known(clicks: Sequence[Click], pairs: Mapping[str, Pair], output: Path) -> None:
    """Raise UserError when answers are to pairs that are not there: they would be missing in F.jsonl."""
    lost = {click.pair for click in clicks} - pairs.keys()
    if lost:
        raise UserError(
            f"--output {output}: holds answers to {len(lost)} pairs that --pair_data and --golden_data have"
            " not; name their files too, or choose another"
        )


def apply(click: Click, answers: Answers) -> None:
    """A later answer of a rater to the same pair takes the place of the earlier one."""
    of_rater = answers.setdefault(click.rater, {})
    of_rater.pop(click.pair, None)
    if click.choice != "undo":
        of_rater[click.pair] = click


def standing(clicks: Iterable[Click]) -> Answers:
    """What is left when undone answers and those given anew are gone."""
    answers: Answers = {}
    for click in clicks:
        apply(click, answers)
    return answers


def preferences(pairs: Iterable[Pair], answers: Answers) -> Iterator[Record]:
    """Pairs as records for step 2, with a vote from each rater who did not skip; golden questions are not.

    margin: when a rater gave a strength, the mean strength over all of them in favour of the winner, at least
    0; a vote without one counts 1, a tie 0.
    """
    for pair in pairs:
        clicks = [mine[pair.id] for mine in answers.values() if pair.id in mine]
        clicks = [click for click in clicks if click.choice != "skip"]
        if not clicks or pair.answer:
            continue
        votes = [click.choice for click in clicks]
        sign = {"A": 1, "B": -1, "tie": 0}
        total = sum(sign[click.choice] * (click.strength or 1) for click in clicks)
        ahead = votes.count("A") - votes.count("B")
        margin = max(0.0, total * (ahead > 0) - total * (ahead < 0)) / len(votes)
        record = {name: value for name, value in pair.record.items() if name not in {*ANSWERS, "margin"}}
        record |= {"votes": votes, "raters": [click.rater for click in clicks]}
        yield record | ({"margin": round(margin, 4)} if any(click.strength for click in clicks) else {})
