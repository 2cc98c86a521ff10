"""The plan against what PyTorch's MemTracker counts for fake tensors."""

import pytest

from tests.bench.plan_memory import CASES, config_of, plan, track


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("name", "phase"), [*(("7B", phase) for phase in CASES), ("8B", "critic"), ("8B", "scoring")]
)
def test_phases_take_what_is_tracked(name: str, phase: str) -> None:
    """Four layers of Llama 2 7B and Llama 3 8B in full width."""
    config = config_of(name, layers=4)
    assert plan(config, CASES[phase]) == pytest.approx(track(config, CASES[phase]), rel=0.05)
