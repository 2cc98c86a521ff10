"""The loss of the reward model. Pure."""

import torch.nn.functional as F
from torch import Tensor


def pairwise_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) for each pair: scores (B,), margin (B,) or a number -> (B,)
    fp32.

    Bradley-Terry likelihood of the observed preference: Ouyang et al. 2022 (InstructGPT), eq. 1; the margin
    is that of Touvron et al. 2023 (Llama 2), eq. 2.
    """
    return -F.logsigmoid(chosen_scores.float() - rejected_scores.float() - margin)
