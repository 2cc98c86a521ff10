"""Decoding with the heads of ILQL: the policy of a folder that has them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from common.generation.options import GuidanceOptions
from common.model.q_heads import FILE, has_heads, load_targets, lowest_q_of_all, saved_beta
from common.runtime.distributed import device, log
from common.runtime.options import UserError


def guided_logits(logits: Tensor, q: Tensor, beta: float) -> Tensor:
    """Logits whose softmax is that of log pi + beta (Q - V): logits (..., V), q (..., V) of every token.

    V(s) and the normaliser of log pi are the same for all tokens of a state, so that they cancel. q: the
    smaller one of the two target Q heads. beta: 1 to 4 for standardised scores. Source: Snell et al. 2022
    (arXiv 2206.11871), section 4.
    """
    return logits.float() + beta * q


def check_guidance(paths: Sequence[str], options: GuidanceOptions, engine: str = "transformers") -> None:
    """Raise UserError for heads that cannot be read, or that the engine does not use, and for --ilql_beta
    without heads or without a meaning.
    """
    if -1 < options.ilql_beta < 0:
        raise UserError(f"--ilql_beta {options.ilql_beta:g}: must be -1, for the saved weight, or at least 0")
    guided = [path for path in paths if has_heads(path) and beta_of(path, options.ilql_beta)]
    if guided and engine != "transformers":
        raise UserError(
            f"--rollout_engine {engine}: does not decode with the heads of ILQL in {guided[0]}; allowed:"
            " transformers, or --ilql_beta 0 for the policy alone"
        )
    if options.ilql_beta > 0 and not guided:
        raise UserError(
            f"--ilql_beta {options.ilql_beta:g}: {' '.join(paths)}: no {FILE}; use `final/` of step2_ilql.sh"
        )


def beta_of(path: str, beta: float) -> float:
    """Weight of Q in decoding with the heads in a folder; below 0: the one saved there."""
    saved = saved_beta(path)
    return saved if beta < 0 else beta


def guide(model: PreTrainedModel, path: str, beta: float) -> PreTrainedModel:
    """Let the model return guided logits, if its folder has heads and beta is not 0; below 0: the saved one.

    Sampling, log-probabilities and KL are then all those of the guided policy: temperature, top-k and top-p
    apply to what this returns. The heads are a full copy on every rank, in the precision of the model.
    """
    if not has_heads(path):
        return model
    if not (beta := beta_of(path, beta)):
        log(f"{path}: decodes with the policy alone, without its heads of ILQL")
        return model
    text = model.config.get_text_config()
    heads = load_targets(path, text.hidden_size, text.vocab_size).to(device(), model.dtype)
    states: list[Tensor] = []

    def keep_states(_: nn.Module, arguments: tuple[Tensor], __: Tensor) -> None:
        states.append(arguments[0])  # as they are before the output head, often of a few positions

    def add_q(_: nn.Module, __: Any, outputs: Any) -> Any:
        outputs.logits = guided_logits(outputs.logits, lowest_q_of_all(heads, states.pop()), beta)
        return outputs

    model.get_output_embeddings().register_forward_hook(keep_states)
    model.register_forward_hook(add_q)
    model.has_own_logits = True  # see `label_pass`
    log(f"{path}: decodes with its heads of ILQL, --ilql_beta {beta:g}")
    return model
