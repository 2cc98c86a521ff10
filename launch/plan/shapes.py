"""Shape of a model from its configuration, built without weights on PyTorch's meta device."""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from common.model.families import active_share, attention_widths, check_policy, check_scalar
from common.model.loading import load_config
from common.model.lora import add_adapters
from common.model.nf4 import linear_layers
from common.runtime.options import LoraOptions, UserError, reason
from common.text.transformers_internals import attention_implementation
from launch.plan.memory import Shape, nf4_bytes

# Tensors of the MLP's width saved by an activation and the matrix after it. Usually 2, input and output; ReLU
# saves only its output, and a GELU written in Python each of its factors.
SAVED_BY_ACTIVATION = {"ReLU": 1, "NewGELUActivation": 5}
SAVED_BY_GATE = 2  # the other factor and the product


class Matrix(NamedTuple):
    """A linear module of a layer."""

    is_attention: bool
    inputs: int
    outputs: int


@cache
def read_shape(
    path: str, is_scalar: bool, rank: int, targets: tuple[str, ...], kernels: str = "auto",
    quantisation: Literal["none", "single", "double"] = "none",
) -> Shape:  # fmt: skip
    """Shape of the model at `path`, as a language model or with a scalar head; with adapters if rank is not
    0. kernels: --attn_implementation. quantisation: of the linear layers, to 4 bits.

    Raises UserError for a missing model, and for layers other than dense attention and a dense MLP.
    """
    config = load_config(path)
    kind = AutoModelForSequenceClassification if is_scalar else AutoModelForCausalLM
    if is_scalar:
        config.num_labels = 1
        check_scalar(config)
    else:
        check_policy(config)
    with torch.device("meta"):
        try:
            model = kind.from_config(config, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - invalid configurations raise anything
            raise UserError(f"{path}: {reason(error)}") from None
        widths = _widths(model, path)
        largest = max(p.numel() for p in model.parameters())
        packed = [] if quantisation == "none" else [m.weight.numel() for m in linear_layers(model).values()]
        options = LoraOptions(lora_rank=rank, lora_target_modules=[*targets])
        parameters = list(add_adapters(model, options, seed=0).parameters())
    return Shape(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        largest=largest,
        vocabulary=config.get_text_config().vocab_size,
        has_eager_attention="eager"
        in (kernels, attention_implementation(model.config) * (kernels == "auto")),
        tensors=tuple(p.numel() for p in parameters),
        in_4bit=sum(packed),
        bytes_of_4bit=sum(nf4_bytes(size, quantisation == "double") for size in packed),
        largest_in_4bit=max(packed, default=0),
        **widths,
    )


def _widths(model: PreTrainedModel, path: str) -> dict[str, int]:
    """The sizes of one layer as fields of Shape, from its modules, independent of their names."""
    config = model.config.get_text_config()
    hidden, count = config.hidden_size, config.num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    modules = dict(stacks[0][0].named_modules()) if stacks else {}
    matrices = [m for name, module in modules.items() for m in _matrix(name, module)]
    # The inputs of matrices that write to the residual stream are the inner widths of attention and MLP.
    back = {m.is_attention: m.inputs for m in matrices if m.outputs == hidden}
    is_dense = len(attention_widths(config)) == count and active_share(config) == 1
    if not is_dense or len(back) < 2 or any("expert" in name for name in modules):
        raise UserError(f"{path}: {type(model).__name__} has no dense layers, which a plan needs")
    forth = {side: sum(m.outputs for m in matrices if m.is_attention is side) - hidden for side in back}
    classes = {type(module).__name__ for module in modules.values()}
    saved = next((count for name, count in SAVED_BY_ACTIVATION.items() if name in classes), 2)
    norms = [name.rsplit(".", 1)[-1] for name, m in modules.items() if "Norm" in type(m).__name__]
    keys = (forth[True] - back[True]) // 2
    of_heads = {"q_norm": back[True], "k_norm": keys}
    return {
        "layers": count,
        "hidden": hidden,
        "heads": config.num_attention_heads,
        "queries": back[True],
        "keys": keys,
        "mlp": back[False],
        "saved_in_mlp": saved + SAVED_BY_GATE * (forth[False] // back[False] - 1),
        "norms": sum(name not in of_heads for name in norms),
        "head_norms": sum(of_heads.get(name, 0) for name in norms),
        "has_rms_norm": any("RMSNorm" in name for name in classes),
    }


def _matrix(name: str, module: nn.Module) -> list[Matrix]:
    if type(module).__name__ == "Conv1D":  # GPT-2's transposed linear layer
        return [Matrix("att" in name, *module.weight.shape)]
    return [Matrix("att" in name, *reversed(module.weight.shape))] if isinstance(module, nn.Linear) else []
