"""The tiny models, written once."""

from pathlib import Path

import pytest

from common.model import head
from tests.recomputed.tiny import SIZES, write_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens per chunk of the output head, so that every pass has several chunks."""
    monkeypatch.setattr(head, "CHUNK", 5 * SIZES["vocab_size"])
