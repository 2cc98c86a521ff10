"""Forward passes, AdamW, clipping and schedules in plain PyTorch. Shares no code with the suite.

Every row has its own forward pass, without padding.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

Rows = Sequence[Sequence[int]]


def load(path: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path).eval()


def load_scorer(path: str, **settings: int) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification.from_pretrained(path, **settings).eval()


def all_logits(model: LlamaForCausalLM, ids: Sequence[int]) -> Tensor:
    """Logits (T, V) after each token."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def response_logprobs(model: LlamaForCausalLM, ids: Sequence[int], start: int) -> Tensor:
    """Log-probability of each token from `start` on."""
    logprobs = torch.log_softmax(all_logits(model, ids), dim=-1)
    return torch.stack([logprobs[position - 1, ids[position]] for position in range(start, len(ids))])


def states(model: LlamaForSequenceClassification, ids: Sequence[int]) -> Tensor:
    """Hidden states (T, hidden size)."""
    return model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def scores(model: LlamaForSequenceClassification, ids: Sequence[int], mean: float, std: float) -> Tensor:
    """Score (T,) after each token, centred."""
    return (model.score(states(model, ids))[:, 0] - mean) / std


def padded_share(lengths: Sequence[int], micro: int) -> float:
    """Share of padding when rows of similar length are `micro` to a batch."""
    ordered = sorted(lengths)
    batches = [ordered[start : start + micro] for start in range(0, len(ordered), micro)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def rate_factor(kind: str, step: int, steps: int, warmup: int = 0) -> float:
    """Share of the peak learning rate at update `step` (from 0) of `steps`."""
    if step < warmup:
        return step / warmup
    passed = (step - warmup) / (steps - warmup)
    match kind:
        case "constant":
            return 1.0
        case "linear":
            return 1 - passed
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * passed))
    raise ValueError(kind)


class Optimiser:
    """AdamW with weight decay on matrices only, after clipping by the norm of all gradients."""

    def __init__(self, model: nn.Module, betas: tuple[float, float], eps: float, decay: float) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in self._parameters if p.ndim > 1]
        vectors = [p for p in self._parameters if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, foreach=False)

    def step(self, loss: Tensor, rate: float, most: float) -> float:
        """Update with the gradients of the loss; returns their norm before clipping."""
        self._adamw.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        for gradient in gradients:
            if most and norm > most:
                gradient *= most / norm
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        return norm


def adapted(model: PreTrainedModel, rank: int, alpha: float, seed: int) -> Any:
    """The model with new adapters on all linear layers, drawn with the seed; a scalar head is trained."""
    torch.manual_seed(seed)
    kinds: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if hasattr(model, "score"):
        kinds = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", **kinds)
    return get_peft_model(model, config).get_base_model()


def merged(model: Any, rank: int, alpha: float) -> dict[str, Tensor]:
    """Adapted weights and the scalar head: W + alpha / r B A (Hu et al. 2021)."""
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            down, up = (part["default"].weight.detach() for part in (module.lora_A, module.lora_B))
            weights[f"{name}.weight"] = module.base_layer.weight.detach() + alpha / rank * up @ down
    if hasattr(model, "score"):
        weights["score.weight"] = model.score.modules_to_save["default"].weight.detach()
    return weights
