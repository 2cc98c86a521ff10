"""Names of transformers that its documentation does not promise. Read from version 5.23.0."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils.chat_template_utils import _compile_jinja_template


def compile_chat_template(source: str) -> Any:
    """The jinja template that `apply_chat_template` renders, with its globals and extensions."""
    return _compile_jinja_template(source)


def weight_files(path: str, config: PretrainedConfig) -> list[str]:
    """The files that `from_pretrained` would read: their order of preference is not public."""
    files, _ = _get_resolved_checkpoint_files(
        path, variant=None, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False,
        transformers_explicit_filename=getattr(config, "transformers_weights", None),
    )  # fmt: skip
    return files


def supports_kind(auto_class: Any, config: PretrainedConfig) -> bool:
    """Whether an `AutoModelFor...` class has a model for this configuration."""
    return type(config) in auto_class._model_mapping


def keeps_states_in_cache(model_class: Any) -> bool:
    """Whether `generate` gives this model a cache that holds all of its states."""
    return model_class._supports_default_dynamic_cache()


def next_inputs(model: Any, outputs: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the next decoding step (mask, positions, cache), as `generate` makes them."""
    return model._update_model_kwargs_for_generation(outputs, inputs)


def attention_implementation(config: PretrainedConfig) -> str:
    """Name of the attention kernels that a loaded model uses."""
    return config._attn_implementation


def takes_prepared_mask(model: Any) -> bool:
    """Whether the model takes a 4-D attention mask as it is, and no inputs beyond ids, mask and positions.

    `generate` passes such a mask to models that it compiles. Position biases (ALiBi) need the 2-D mask.
    """
    own = any(
        getattr(type(model), name, None) is not getattr(GenerationMixin, name, None)
        for name in ("prepare_inputs_for_generation", "create_masks_for_generate")
    )
    has_bias = getattr(model.config.get_text_config(), "alibi", False)
    kernels = attention_implementation(model.config)
    return model._can_compile_fullgraph and not own and not has_bias and kernels in ("sdpa", "eager")


def mark_static(tensor: Tensor) -> None:
    """Let CUDA graphs write to a tensor in place, as the static caches of transformers do."""
    torch._dynamo.mark_static_address(tensor)


def router_class(model: Any) -> type | None:
    """Class of the modules whose first output is the router logits of a layer; None for dense models."""
    recorder = (model._can_record_outputs or {}).get("router_logits")
    return recorder.target_class if getattr(recorder, "index", None) == 0 else None
