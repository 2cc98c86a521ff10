"""Rollouts for tests: what a test does not give is 0, and all tokens could be drawn."""

from typing import Any

import torch
from torch import Tensor

from step3_ppo.rollout import Rollout


def rollout_of(
    input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor, ended: Tensor, **fields: Any
) -> Rollout:
    rows, width = len(input_ids), int(response_lengths.max())
    logprobs = fields.pop("logprobs", torch.zeros(rows, width))
    empty = torch.zeros_like(logprobs)
    lists = [torch.zeros(0, dtype=torch.int32)] * rows
    rest = {
        "behaviour_logprobs": logprobs.clone(), "logprobs": logprobs, "ref_logprobs": empty, "values": empty,
        "last_values": empty[:, 0], "scores": empty[:, 0],
        "score_parts": empty[:, :0], "step_scores": empty, "step_ends": empty.bool(),
        "support_sizes": empty.int(), "support_ids": lists,
        "computed": torch.zeros(rows),
    }  # fmt: skip
    return Rollout(input_ids, prompt_lengths, response_lengths, ended, **{**rest, **fields})
