"""The loss of the process reward model. Pure."""

import torch.nn.functional as F
from torch import Tensor


def step_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-y log sigmoid(s) - (1 - y) log sigmoid(-s) of each step: the cross-entropy of its label.

    Scores s (N,): log-odds that the step is right, and labels y (N,): 1 for right, 0 for wrong, between them
    for a soft label -> (N,) fp32, in nats. Source: Wang et al. 2024 (Math-Shepherd), eq. 2; Uesato et al.
    2022; Lightman et al. 2023.
    """
    scores = scores.float()
    return -labels * F.logsigmoid(scores) - (1.0 - labels) * F.logsigmoid(-scores)
