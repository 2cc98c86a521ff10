"""Target Q heads: slow copies of the Q heads, in fp32 on every rank, beside the engine."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.model.engine_protocol import Engine
from common.model.forward import base_model
from common.model.q_heads import NAME, Heads, q_heads
from common.runtime.distributed import device, log, rank, sum_tensor_over_ranks


def add_heads(model: nn.Module, seed: int) -> nn.Module:
    """Add new heads to a model, or to the one inside peft's wrapper, the same on every rank."""
    base: PreTrainedModel = base_model(model)
    text = base.config.get_text_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(text.hidden_size, text.vocab_size)
    setattr(base, NAME, heads.to(base.dtype))
    return model


def load_targets(engine: Engine, average: dict[str, Tensor], is_resumed: bool) -> nn.ModuleList:
    """The target heads: copies of the Q heads, or those of the checkpoint.

    average: the state's field for averages, on rank 0; it gets the tensors, so that checkpoints have them.
    Every rank must call it.
    """
    text = base_model(engine).config.get_text_config()
    with torch.device(device()):
        targets = q_heads(text.hidden_size, text.vocab_size).float().requires_grad_(False)
    if is_resumed:
        for name, tensor in targets.state_dict().items():
            saved = average[name].to(device()) if rank() == 0 else torch.zeros_like(tensor)
            tensor.copy_(sum_tensor_over_ranks(saved))
    else:
        move_targets(targets, engine, alpha=1.0)
    if rank() == 0:
        average.update(targets.state_dict())
    return targets


def move_targets(targets: nn.ModuleList, engine: Engine, alpha: float) -> None:
    """target <- (1 - alpha) target + alpha weight, for the Q heads' weights in the optimiser's fp32.

    Every rank must call it. Source: Polyak averaging, as in Lillicrap et al. 2016 (DDPG), section 3.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    trained = getattr(base_model(engine), NAME).q.state_dict(keep_vars=True)
    for name, target in targets.state_dict().items():
        weight = safe_get_full_fp32_param(trained[name])
        target.lerp_((trained[name] if weight is None else weight).detach().float(), alpha)


def warn_of_slow_targets(alpha: float, moves: int) -> None:
    """Log a warning if the target heads, which decoding uses, stay far from the Q heads."""
    if (share := 1 - (1 - alpha) ** moves) < 0.9:
        log(
            f"warning: --alpha {alpha:g}: {moves} moves take the target Q heads {share:.0%} of the way from a"
            " random start to the Q heads, and decoding uses them; give more steps or a higher --alpha"
        )


def head_weights(state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Take the weights of the heads out of a model's state dict; returns them with the names of `Heads`."""
    names = [name for name in state if f".{NAME}." in f".{name}"]
    return {name.partition(f"{NAME}.")[2]: state.pop(name) for name in names}
