"""FLOPs, against a model counted by hand, peak FLOP/s of GPUs, and memory of phases."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from common.training import metrics
from common.training.metrics import Phases, peak_memory_gib, phase_memory, training_flops, utilisation

# Vocabulary, hidden size, intermediate size, layers, heads, key-value heads, head size.
V, D, F, L, H, K, S = 50, 32, 64, 2, 4, 2, 16
LENGTHS = [7, 12, 3]
PARAMETERS = 2 * V * D + L * (2 * D * H * S + 2 * D * K * S + 3 * D * F + 2 * D) + D
ATTENTION = 12 * L * H * S * (7**2 + 12**2 + 3**2)


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
            num_key_value_heads=K, head_dim=S,
        )
    )  # fmt: skip


def test_flops_of_a_llama():
    assert training_flops(model(), LENGTHS) == 6 * PARAMETERS * 22 + ATTENTION


def test_frozen_parameters_have_no_gradient_flops():
    adapted = get_peft_model(model(), LoraConfig(r=3, target_modules=["q_proj"]))
    adapters = L * 3 * (D + H * S)
    assert training_flops(adapted, LENGTHS) == (4 * PARAMETERS + 6 * adapters) * 22 + ATTENTION


def test_partitioned_parameters_count_in_full():
    config = SimpleNamespace(num_attention_heads=2, hidden_size=6, num_hidden_layers=1)
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_numel = 1000
    part = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config), named_parameters=lambda: [("", parameter)]
    )
    assert training_flops(part, [5]) == 6 * 1000 * 5 + 12 * 6 * 5**2


def test_peaks_are_those_of_a_phase(monkeypatch):
    """Tensors take 3, 5 and 1 GiB at most, reserved blocks 4, 7 and 2; a call begins the next phase."""
    gib, phases = 2**30, iter([(3, 4), (5, 7), (1, 2)])
    now = {}

    def begin() -> None:
        now["allocated"], now["reserved"] = next(phases)

    begin()
    monkeypatch.setattr(metrics, "_peak_bytes", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: now["allocated"] * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: now["reserved"] * gib)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begin)
    assert phase_memory() == {"memory/allocated_gib": 3, "memory/reserved_gib": 4}
    emptied, phases_of_a_step = [], Phases()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    phases_of_a_step.end("train")
    assert phases_of_a_step.memory == {"memory/allocated_gib_train": 5, "memory/reserved_gib_train": 7}
    assert len(phases_of_a_step.seconds) == len(emptied) == 1
    assert peak_memory_gib() == 5, "of the run, not of the last phase"


def test_a_cpu_has_no_phases_of_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert phase_memory("train") == {} and peak_memory_gib() > 0


def test_only_active_experts_count():
    """One attention layer, one recurrent layer; 2 of 8 experts are active."""
    config = SimpleNamespace(
        num_attention_heads=2, hidden_size=6, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    sizes = {"mlp.experts.down": 800, "mlp.shared_expert.down": 100}
    parameters = [(name, torch.nn.Parameter(torch.empty(size))) for name, size in sizes.items()]
    mixture = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config), named_parameters=lambda: parameters
    )
    assert training_flops(mixture, [5]) == 6 * 300 * 5 + 12 * 6 * 5**2


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
    ],
)
def test_utilisation_at_half_the_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert utilisation(flops=4 * peak, seconds=2.0)["train/mfu"].value == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["NVIDIA H20", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Quadro P600", None])
def test_no_utilisation_without_a_known_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert utilisation(1e12, 1.0) == {}
