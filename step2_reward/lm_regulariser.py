"""Language-model loss as a regulariser of the reward model: its backbone stays a language model."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from common.model.head import Targets, in_chunks
from common.model.loading import is_scalar, load_causal_lm, load_config
from common.model.zero import unpartitioned
from common.runtime.distributed import device
from common.runtime.options import UserError
from step2_reward.data import Batch
from step2_reward.options import RewardOptions


def load_language_head(
    options: RewardOptions, tokenizer: PreTrainedTokenizerFast, zero: dict
) -> nn.Module | None:
    """Load the SFT model's output head, frozen. None without --lm_loss_coef.

    It is loaded from --model_name_or_path at every start, and is not part of checkpoints or exports.
    """
    if not options.lm_loss_coef:
        return None
    model = load_causal_lm(options.model_name_or_path, tokenizer, unpartitioned(zero))
    return model.get_output_embeddings().requires_grad_(False).to(device())


def check_language_model(options: RewardOptions) -> None:
    """Raise UserError when --lm_loss_coef needs an output head that the model lacks."""
    if options.lm_loss_coef and is_scalar(load_config(options.model_name_or_path)):
        raise UserError(
            f"--lm_loss_coef {options.lm_loss_coef:g}: {options.model_name_or_path} is a reward model"
            " without a language-model head; it must be 0"
        )


def best_response_logprobs(head: nn.Module, states: Tensor, batch: Batch) -> Tensor:
    """Log-probabilities (N,) of the best responses' tokens. states: (R, T, hidden size)."""
    before = torch.zeros_like(batch.is_best)
    before[:, :-1] = batch.is_best[:, 1:]
    targets = Targets(batch.input_ids[batch.is_best], is_summed=True)
    return in_chunks(head, states[before], targets)[0]
