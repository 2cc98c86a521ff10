"""Kernels that give the same bytes every time."""

import pytest
import torch

from common.generation.decoding import cumulative_sums
from common.runtime.distributed import any_kernels, use_deterministic_kernels


def test_any_kernels_inside_deterministic_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        use_deterministic_kernels()
        with any_kernels():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with any_kernels():
        pass
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_cumulative_sums(rows: int) -> None:
    probabilities = torch.rand(rows, 33).softmax(-1)
    assert torch.equal(cumulative_sums(probabilities), probabilities.cumsum(-1))
