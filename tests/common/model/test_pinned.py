"""Frozen models in pinned host memory."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.model import pinned
from common.model.pinned import ALIGNMENT, pin_weights


class Tied(nn.Module):
    """Tensors of several types and sizes, one of them with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(33, 5, dtype=torch.bfloat16)
        self.head = nn.Linear(5, 33, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight
        self.score = nn.Linear(5, 1)
        self.score.weight.data = torch.randn(5, 1).T  # not contiguous
        self.register_buffer("steps", torch.tensor(7))


def test_weights_move_to_one_registered_block(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    runtime = SimpleNamespace(cudaHostRegister=lambda *call: calls.append(call) or 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None if code == 0 else pytest.fail("code"))
    monkeypatch.setattr(pinned, "on_cpu", lambda: False)
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    assert pin_weights(model) is model and model.head.weight is model.embedding.weight
    ((start, size, _),) = calls
    tensors = [*model.parameters(), *model.buffers()]
    assert size < sum(tensor.nbytes for tensor in tensors) + len(tensors) * ALIGNMENT
    spans = sorted((tensor.data_ptr() - start, tensor.nbytes) for tensor in tensors)
    assert all(first % ALIGNMENT == 0 for first, _ in spans) and spans[0][0] == 0
    assert all(a + length <= b for (a, length), (b, _) in zip(spans, [*spans[1:], (size, 0)], strict=True))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_a_failure_of_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"CUDA error {code}")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(pinned, "on_cpu", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        pin_weights(nn.Linear(2, 2))


def test_without_a_gpu_tensors_stay_where_they_are() -> None:
    model = nn.Linear(2, 2)
    places = [tensor.data_ptr() for tensor in model.parameters()]
    assert [tensor.data_ptr() for tensor in pin_weights(model).parameters()] == places
