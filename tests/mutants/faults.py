"""One-line faults, as data: `AREA.toml` holds a table for each.

[name]
about = "what is wrong"
file = "path in the repository"
old = "text that stands there exactly once"
new = "its replacement"
tests = ["files or single tests that should notice, the quickest first"]
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent


class Fault(NamedTuple):
    """A fault, and the tests that should notice it."""

    area: str
    name: str
    about: str
    file: str
    old: str
    new: str
    tests: list[str]

    def problem(self, root: Path) -> str:
        """Why the fault cannot be put into the repository at `root`; empty if it can."""
        path = root / self.file
        count = path.read_text().count(self.old) if path.exists() else 0
        if count != 1:
            return f"{self.area}.{self.name}: its old text stands {count} times in {self.file}"
        missing = [test for test in self.tests if not (root / test.partition("::")[0]).exists()]
        return f"{self.area}.{self.name}: no such test: {', '.join(missing)}" if missing else ""

    def apply(self, root: Path) -> None:
        path = root / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


def read_faults() -> list[Fault]:
    return [
        Fault(path.stem, name, **fields)
        for path in sorted(FOLDER.glob("*.toml"))
        for name, fields in tomllib.loads(path.read_text()).items()
    ]
