"""The heads of ILQL on the last hidden states of a language model, and their file beside it.

FOLDER/ilql/heads.safetensors holds the Q heads `q`, the V head `v`, the target Q heads `target`, and in its
metadata `ilql_beta`. In a folder of its own no loader of plain models takes it for weights of the model.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from common.model.head import CHUNK
from common.model.linear_head import Wide, trained_weights, wide_logits
from common.runtime.files import flush_file
from common.runtime.options import UserError, reason

FILE = Path("ilql", "heads.safetensors")
BETA = "ilql_beta"
NAME = "ilql_heads"  # attribute of the model in training
NUM_Q = 2


class HeadOutputs(NamedTuple):
    """Outputs for N states and actions, in fp32."""

    q: Tensor  # (2, N) Q(s, a) of both heads
    logsumexps: Tensor  # (2, N) over all tokens
    values: Tensor  # (N,) V(s)


class ActionValues(nn.Linear):
    """Last layer of a Q head: one value per token, never those of all states in memory at once."""

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Q of the actions, and the log-sum-exp over all tokens: states (N, h), actions (N,) -> (2, N)."""
        size = max(1, CHUNK // len(self.weight))
        if len(states) <= size:
            return self._outputs(states, actions)
        parts = [
            checkpoint(self._outputs, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(states.split(size), actions.split(size), strict=True)
        ]
        return torch.cat(parts, dim=1)

    def _outputs(self, states: Tensor, actions: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32:
            q = linear(states, self.weight, self.bias)
        else:
            q = Wide.apply(self, states, *trained_weights(self).values())
        return torch.stack([q.gather(1, actions[:, None])[:, 0], q.logsumexp(1)])


class Value(nn.Linear):
    """Last layer of the V head, in fp32."""

    def forward(self, states: Tensor) -> Tensor:
        return linear(states.float(), self.weight.float(), self.bias.float())[:, 0]


class Head(nn.Module):
    """Linear(h, 2h), ReLU, and a last layer, as in trlx."""

    def __init__(self, hidden_size: int, last: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden_size, 2 * hidden_size), last

    def forward(self, states: Tensor, *actions: Tensor) -> Tensor:
        return self.down(self.up(states).relu(), *actions)


class Heads(nn.Module):
    """Two Q heads and a V head."""

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__()
        self.q, self.v = q_heads(hidden_size, vocabulary), Head(hidden_size, Value(2 * hidden_size, 1))

    def forward(self, states: Tensor, actions: Tensor) -> HeadOutputs:
        q, logsumexps = torch.stack([head(states, actions) for head in self.q], dim=1)
        return HeadOutputs(q, logsumexps, self.v(states))


def q_heads(hidden_size: int, vocabulary: int) -> nn.ModuleList:
    """Q heads with random weights."""
    last = [ActionValues(2 * hidden_size, vocabulary) for _ in range(NUM_Q)]
    return nn.ModuleList(Head(hidden_size, one) for one in last)


def lowest_q(heads: nn.ModuleList, states: Tensor, actions: Tensor) -> Tensor:
    """Smaller one of the two Q of each action, without those of other tokens: states (N, h), actions (N,) ->
    (N,).
    """
    by_head = []
    for head in heads:
        hidden = head.up(states.to(head.up.weight.dtype)).relu()
        by_head.append((hidden * head.down.weight[actions]).sum(1) + head.down.bias[actions])
    return torch.minimum(*by_head)


def lowest_q_of_all(heads: nn.ModuleList, states: Tensor) -> Tensor:
    """Smaller one of the two Q of every token: states (n, h) -> (n, V) fp32."""
    return torch.minimum(*(wide_logits(head.down, head.up(states).relu()) for head in heads))


def save_heads(folder: Path, heads: Mapping[str, Tensor], targets: Mapping[str, Tensor], beta: float) -> None:
    """Write the file. heads: with the names of `Heads`; targets: with those of `q_heads`."""
    (folder / FILE).parent.mkdir(parents=True)
    tensors = {**heads, **{f"target.{name}": tensor for name, tensor in targets.items()}}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in a random order.
    save_file(tensors, folder / FILE, metadata={BETA: repr(beta)})
    flush_file(folder / FILE)


def has_heads(path: str) -> bool:
    """Whether a model folder has heads of ILQL."""
    return (Path(path) / FILE).is_file()


def saved_beta(path: str) -> float:
    """`ilql_beta` of the heads in a model folder. Raises UserError for a damaged file."""
    file = Path(path) / FILE
    try:
        with safe_open(file, "pt") as content:
            beta = float((content.metadata() or {})[BETA])
            if not 0 <= beta < math.inf:
                raise ValueError(f"{BETA} is {beta}")
            return beta
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file}: not heads of ILQL: {reason(error)}; train again, or delete it") from None


def load_targets(path: str, hidden_size: int, vocabulary: int) -> nn.ModuleList:
    """Target Q heads of a model folder, in fp32. Raises UserError for heads that do not fit the model."""
    file = Path(path) / FILE
    with torch.device("meta"):
        heads = q_heads(hidden_size, vocabulary)
    try:
        with safe_open(file, "pt") as content:
            state = {name: content.get_tensor(f"target.{name}") for name in heads.state_dict()}
        heads.load_state_dict(state, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{file}: does not fit the model beside it: {reason(error)}") from None
    return heads.requires_grad_(False)
