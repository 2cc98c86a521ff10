"""What all tests share: one thread, the CPU unless --gpu, the shared folder, reference values."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "--gpu" not in sys.argv:
    # Ranks are forked, and two of them cannot share a GPU.
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

# The tolerance of every comparison with a reference value or a closed form.
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


# Functions that start ranks or scripts.
STARTS = {"run_stage", "start_stage", "succeed", "bash", "launch", "subprocess", "Popen"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="leave GPUs visible, for tests that need one")
    parser.addoption("--whole", action="store_true", help="also tests that are slow and rarely fail")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "end_to_end: starts ranks or scripts, or takes seconds")
    config.addinivalue_line("markers", "rare: slow and rarely fails; skipped without --whole")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that start ranks or scripts: they take most of the time. Skip rare ones without --whole."""
    for item in items:
        if item.get_closest_marker("rare") and not config.getoption("--whole"):
            item.add_marker(pytest.mark.skip(reason="slow and rare: runs with --whole"))
        fixtures = [one for same in item._fixtureinfo.name2fixturedefs.values() for one in same]
        functions = [item.function, *(fixture.func for fixture in fixtures)]
        if {"end_to_end", "bad_input"} & {*item.path.parts} or any(
            STARTS & {*f.__code__.co_names} for f in functions
        ):
            item.add_marker(pytest.mark.end_to_end)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenised data goes with the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def start_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop ends a process at any moment at first; forks inherit what a test has changed."""
    from common.runtime import process

    monkeypatch.setattr(process, "_last_line", process.PREPARING)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models, tokenizers, data and reference values, beside the repository."""
    if not SHARED.exists():
        pytest.skip(f"needs the shared folder beside the repository: {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def reference(shared: Path) -> Callable[[str], SimpleNamespace]:
    """Looks a case up by its id: params, inputs and outputs as attributes, lists of numbers as tensors."""
    cases = {case["id"]: case for case in json.loads((shared / "reference/values.json").read_text())["cases"]}

    def look_up(case_id: str) -> SimpleNamespace:
        case = cases[case_id]
        return SimpleNamespace(**{part: _tensors(case[part]) for part in ("params", "inputs", "outputs")})

    return look_up


def _tensors(values: dict[str, Any]) -> SimpleNamespace:
    converted = {k: torch.tensor(v) if isinstance(v, list | float) else v for k, v in values.items()}
    return SimpleNamespace(**converted)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained Llama and the quickstart's data."""
    from tests.stages import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages on one rank, with full weights."""
    from tests.ranks import succeed
    from tests.stages import ppo, reward, sft

    folder = tmp_path_factory.mktemp("run")
    succeed("step1_sft.main", sft(world, folder / "sft"), folder)
    succeed("step2_reward.main", reward(world, folder / "sft/final", folder / "reward"), folder)
    succeed(
        "step3_ppo.main", ppo(world, folder / "sft/final", folder / "reward/final", folder / "ppo"), folder
    )
    return folder


@pytest.fixture(scope="session")
def lora_run(world: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three stages on one rank, with adapters, each from the same start as `run`."""
    from tests.ranks import succeed
    from tests.stages import LORA, ppo, reward, sft

    folder = tmp_path_factory.mktemp("lora")
    succeed("step1_sft.main", [*sft(world, folder / "sft"), *LORA], folder)
    succeed("step2_reward.main", [*reward(world, run / "sft/final", folder / "reward"), *LORA], folder)
    start = run / "sft/final", run / "reward/final"
    succeed("step3_ppo.main", [*ppo(world, *start, folder / "ppo"), *LORA], folder)
    return folder
