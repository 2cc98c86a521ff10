"""The cache of reference log-probabilities."""

from pathlib import Path

import pytest

from step2_reward.direct.data import Choice
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.reference import _key

ROWS = [Choice([1, 2, 3, 4], [2, 2], [1, 1], [0.0, 1.0])]


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


def key(model: str, **options: object) -> str:
    return _key(ROWS, DirectOptions(model_name_or_path=model, **options), {})


def test_losses_share_the_log_probabilities_of_the_reference(model: str) -> None:
    """Those of --ld_alpha weigh tokens, and those of kto have unrelated responses."""
    plain = key(model)
    assert key(model, loss="aot") == key(model, loss="dpo", wpo=True, beta=1.0) == plain
    others = [key(model, **o) for o in ({"ld_alpha": 0.5}, {"ld_alpha": 0.4}, {"loss": "kto"})]
    assert len({plain, *others}) == 4
