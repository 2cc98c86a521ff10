"""Log-probabilities of responses under a policy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.data.batching import pad_rows
from common.model.forward import pad_token_id, token_logprobs
from common.runtime.distributed import device
from step2_reward.direct.data import Dialogue


def response_logprobs(
    model: nn.Module, dialogues: Sequence[Dialogue], with_prompt: Sequence[bool] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probabilities summed over tokens, (N,) fp32, in one forward pass.

    Returns those of the responses; those of the responses and, where `with_prompt`, their prompts; and the
    load-balancing loss of a mixture of experts times tokens, (). Only these tokens enter the output layer.
    """
    with_prompt = with_prompt or [False] * len(dialogues)
    kinds = [[0] * d.start + [1] * (len(d.ids) - d.start) for d in dialogues]
    input_ids = pad_rows([d.ids for d in dialogues], pad_token_id(model)).to(device())  # (N, T)
    kinds = pad_rows(kinds, -1).to(device())  # (N, T) 0: prompt; 1: response; -1: padding
    is_label = (kinds == 1) | ((kinds == 0) & torch.tensor(with_prompt, device=device())[:, None])
    is_label[:, 0] = False  # no position predicts the first token
    values, balance = token_logprobs(model, input_ids, is_label)  # (tokens,), ()
    logprobs = torch.zeros(is_label.shape, device=device()).masked_scatter(is_label, values)  # (N, T)
    return (logprobs * (kinds == 1)).sum(1), logprobs.sum(1), balance
