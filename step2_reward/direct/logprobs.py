"""Log-probabilities of responses under a policy."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.data.batching import batches_of_rank, micro_batch, pad_rows
from common.model.forward import pad_token_id, token_logprobs
from common.model.head import Entropy
from common.runtime.distributed import device, sum_tensor_over_ranks
from step2_reward.direct.data import Choice, Dialogue, Example
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.rewards import length_weighted_sums


class ResponsePass(NamedTuple):
    """Log-probabilities of N responses, fp32."""

    sums: Tensor  # (N,) over the tokens of the response
    sums_with_prompt: Tensor  # (N,) where asked for, over those of the prompt too
    tokens: Tensor  # (N, T), 0 outside
    is_response: Tensor  # (N, T)
    entropy: Tensor  # (N, T) before each token; 0 where it is not asked for


def response_logprobs(
    model: nn.Module, dialogues: Sequence[Dialogue], with_prompt: Sequence[bool] = (),
    entropy: Entropy = "none",
) -> ResponsePass:  # fmt: skip
    """Compute log-probabilities of responses and, where `with_prompt`, of their prompts in one forward pass.

    Only these tokens enter the output layer.
    """
    with_prompt = with_prompt or [False] * len(dialogues)
    kinds = [[0] * d.start + [1] * (len(d.ids) - d.start) for d in dialogues]
    input_ids = pad_rows([d.ids for d in dialogues], pad_token_id(model)).to(device())  # (N, T)
    kinds = pad_rows(kinds, -1).to(device())  # (N, T) 0: prompt; 1: response; -1: padding
    is_label = (kinds == 1) | ((kinds == 0) & torch.tensor(with_prompt, device=device())[:, None])
    is_label[:, 0] = False  # no position predicts the first token
    of_labels = token_logprobs(model, input_ids, is_label, entropy)
    zeros = torch.zeros(is_label.shape, device=device())
    logprobs, entropies = (zeros.masked_scatter(is_label, values) for values in of_labels[:2])  # (N, T)
    is_response = is_label & (kinds == 1)
    tokens = logprobs * is_response
    return ResponsePass(tokens.sum(1), logprobs.sum(1), tokens, is_response, entropies)


def compared_logprobs(one: ResponsePass, rows: Sequence[Choice], options: DirectOptions) -> Tensor:
    """Log-probabilities (N,) that the loss compares, of all responses of the rows; see --ld_alpha."""
    if options.ld_alpha == 1:
        return one.sums
    shared = [min(d.num_predicted for d in row.dialogues) for row in rows for _ in row.ranks]
    shared = torch.tensor(shared, device=device())
    return length_weighted_sums(one.tokens, one.is_response, shared, options.ld_alpha)


@torch.no_grad()
def logprobs_of_all(
    model: nn.Module, examples: Sequence[Example], width: int, options: DirectOptions
) -> Tensor:
    """Compute log-probabilities (examples, width). Each rank computes its share, and returns all.

    A row has the responses that the loss compares, then the unrelated one, if any, then zeros.
    """
    result = torch.zeros(len(examples), width, device=device())
    lengths = [max(example.row.lengths) for example in examples]
    shapes = [(len(example.dialogues), example.width) for example in examples]
    for batch_indices, is_real in batches_of_rank(lengths, micro_batch(options), shapes):
        dialogues = [examples[i].dialogues for i in batch_indices]
        one = response_logprobs(model, sum(dialogues, []))
        sums = compared_logprobs(one, [examples[i].row for i in batch_indices], options)
        for i, logprobs in zip(batch_indices, sums.split([*map(len, dialogues)]), strict=True):
            if is_real:
                result[i, : len(logprobs)] = logprobs
    return sum_tensor_over_ranks(result)
