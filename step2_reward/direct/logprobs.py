"""Log-probabilities of responses under a policy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.data.batching import pad_rows
from common.model.forward import logits_and_balance
from common.numeric.tensor_ops import label_logprobs
from common.runtime.distributed import device
from step2_reward.direct.data import Dialogue


def response_logprobs(
    model: nn.Module, dialogues: Sequence[Dialogue], pad_token_id: int, is_whole: Sequence[bool] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each response, summed over its tokens, and of all tokens that were read, (N,) each,
    fp32: of the prompt too where `is_whole`. Then what a mixture of experts adds to the loss, times
    tokens: ().

    Only these tokens take part in the output layer, in one forward pass.
    """
    is_whole = is_whole or [False] * len(dialogues)
    kinds = [[0] * d.start + [1] * (len(d.ids) - d.start) for d in dialogues]
    input_ids = pad_rows([d.ids for d in dialogues], pad_token_id).to(device())  # (N, T)
    kinds = pad_rows(kinds, -1).to(device())  # (N, T) 0: prompt; 1: response; -1: padding
    is_read = (kinds == 1) | ((kinds == 0) & torch.tensor(is_whole, device=device())[:, None])
    is_read[:, 0] = False  # nothing comes before it
    logits, balance = logits_and_balance(model, input_ids, is_read.roll(-1, dims=1))  # (tokens, V), ()
    found = label_logprobs(logits, input_ids[is_read])
    logprobs = torch.zeros(is_read.shape, device=device()).masked_scatter(is_read, found)  # (N, T)
    return (logprobs * (kinds == 1)).sum(1), logprobs.sum(1), balance
