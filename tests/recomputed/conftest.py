"""The tiny models, written once."""

from pathlib import Path

import pytest

from tests.recomputed.tiny import write_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("tiny"))
