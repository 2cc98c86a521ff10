"""The Dockerfile, read: what it copies and runs exists, versions are pinned, scripts reinstall nothing."""

import re
import shutil
import subprocess
from pathlib import Path

from tests.conftest import REPOSITORY

DOCKERFILE = (REPOSITORY / "launch/Dockerfile").read_text()
STEPS = re.findall(r"^([A-Z]+) (.*)$", re.sub(r"\\\n\s*", "", DOCKERFILE), re.M)
COPIED = [
    line[1:]
    for line in (REPOSITORY / "launch/Dockerfile.dockerignore").read_text().splitlines()
    if line.startswith("!")
]


def arguments(instruction: str) -> list[str]:
    return [words for name, words in STEPS if name == instruction]


def test_base_and_packages_are_pinned():
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", arguments("FROM")[0])
    packages = re.search(r"--no-install-recommends (.*?) &&", arguments("RUN")[0])[1].split()
    assert packages and all("=" in package for package in packages)


def test_the_image_holds_what_the_scripts_need():
    assert all((REPOSITORY / name).exists() for name in COPIED)
    folders = {path.parent.relative_to(REPOSITORY).parts[0] for path in REPOSITORY.glob("*/__init__.py")}
    assert set(COPIED) >= (folders | {"common", "launch", "requirements.txt"}) - {"tests"}
    assert arguments("COPY") == ["requirements.txt ./", ". ./"]


def test_the_scripts_reinstall_nothing(tmp_path: Path):
    """After the copies of the image, on a virtual environment without packages."""
    (tmp_path / "launch/lib").mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/bin/true")
    shutil.copy(REPOSITORY / "launch/lib/environment.sh", tmp_path / "launch/lib")
    shutil.copy(REPOSITORY / "requirements.txt", tmp_path)
    copies = re.search(r"&& (cp .*)$", arguments("RUN")[1])[1]
    script = f"{copies} && source launch/lib/environment.sh && install requirements.txt"
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_page_runs_scripts_of_the_image():
    page = (REPOSITORY / "launch/README.md").read_text()
    folder = arguments("WORKDIR")[0]
    scripts = re.findall(rf"{folder}/(\S+)", page)
    assert scripts and all((REPOSITORY / name).is_file() for name in scripts)
