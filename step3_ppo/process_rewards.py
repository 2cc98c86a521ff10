"""Process rewards: each step of a response is scored by the log-probability that it is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from common.data.batching import Tokens, batches_of_own, pad_rows
from common.model.families import max_positions
from common.model.forward import base_model, pad_token_id, token_scores
from common.model.loading import load_config
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import RewardModel, load_members, same_tokenizer
from common.model.roles import check_process_model
from common.runtime.distributed import device
from common.runtime.options import UserError, world_size
from common.runtime.progress import track
from common.text.reasoning_steps import Decode, step_ends
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step3_ppo.option_groups import ProcessOptions

Aggregation = Literal["product", "min", "last"]


@dataclass(frozen=True)
class ProcessModel:
    """A frozen process reward model with the policy's tokenizer, and how its scores are used."""

    model: RewardModel
    separator: str  # that ends a step
    weight: float
    aggregation: Aggregation  # of the steps to the score of a response


class Steps(NamedTuple):
    """The S steps of a response."""

    ids: list[int]  # prompt, response and closing tokens, as the model reads them
    positions: list[int]  # (S,) in `ids`, where a step is scored
    columns: list[int]  # (S,) in the response, of the token that gets the score


def check_process(options: ProcessOptions, encoder: SegmentEncoder, longest: int) -> None:
    """Raise UserError unless --process_model_name_or_path, if given, can score the policy's responses.

    encoder: of the policy. longest: most tokens of a prompt and a response.
    """
    path = options.process_model_name_or_path
    if not path:
        return
    name = f"--process_model_name_or_path {path}"
    config = check_process_model(path, "process_model_name_or_path")
    if not same_tokenizer(encoder.tokenizer, load_tokenizer(path)):
        raise UserError(
            f"{name}: has another tokenizer than the policy, whose tokens get the scores of steps; train one"
            " from a model with the policy's tokenizer"
        )
    if longest >= max_positions(config):
        raise UserError(
            f"{name}: its context length is {max_positions(config)} tokens; --max_prompt_length and"
            f" --max_response_length together are {longest} and must be below it"
        )


def load_process_model(
    options: ProcessOptions, encoder: SegmentEncoder, zero: dict[str, Any], offload: bool = False,
    aggregation: Aggregation = "product",
) -> ProcessModel | None:  # fmt: skip
    """Load the process model, if there is one; zero, offload: as in `load_members`."""
    path = options.process_model_name_or_path
    if not path:
        return None
    (member,) = load_members(EnsembleOptions([path]), [encoder], zero, offload)
    separator = load_config(path).step_separator
    return ProcessModel(member, separator, options.process_weight, aggregation)


def find_steps(
    ids: list[int], prompt: int, response: int, closing: int, separator: str, decode: Decode
) -> Steps:
    """Find the steps of a response.

    ids: prompt, response and closing tokens, as an outcome model would score them. prompt, response, closing:
    number of tokens of each; a response may end with some of the closing tokens. Text after the last
    separator is a step that is scored at the last closing token, as in training, also if the response was
    truncated.
    """
    text = ids[prompt : len(ids) - closing]
    ends = step_ends(text, separator, decode)
    positions = [len(ids) - 1 if end == len(text) else prompt + end for end in ends]
    return Steps(ids, positions, [min(end, response - 1) for end in ends])


@torch.no_grad()
def score_steps(
    process: ProcessModel, responses: Sequence[Steps], width: int, size: int | Tokens, title: str = ""
) -> tuple[Tensor, Tensor]:
    """Log-probability (b, R) that each step is right, on the last token of the step, else 0; and the mask of
    these tokens (b, R).

    responses: b of this rank; every rank has as many. width: R. title: of progress lines; empty: none.
    """
    logprobs = torch.zeros(len(responses), width, device=device())
    ends = torch.zeros_like(logprobs, dtype=torch.bool)
    with process.model.ready() as model:
        room, pad = max_positions(base_model(model).config), pad_token_id(model)
        batches = batches_of_own([len(one.ids) for one in responses], size)
        for batch in track(title, batches, len(responses) * world_size()):
            input_ids = pad_rows([responses[i].ids[-room:] for i in batch], pad).to(device())
            steps = [
                (row, position - max(0, len(responses[i].ids) - room), i, column)
                for row, i in enumerate(batch)
                for position, column in zip(*responses[i][1:], strict=True)
            ]
            rows, positions, index, columns = torch.tensor(steps, device=device()).unbind(1)
            scores = token_scores(model, input_ids, (rows, positions))  # (N,) log-odds
            logprobs[index, columns] = logsigmoid(scores.float())
            ends[index, columns] = True
    return logprobs, ends


def step_probabilities(process: ProcessModel, scores: Tensor, ends: Tensor) -> list[float]:
    """Probability that each step of a response is right; scores, ends: (R,)."""
    return [round(one, 6) for one in (scores[ends] / process.weight).exp().tolist()]


def describe_steps(process: ProcessModel, scores: Tensor, ends: Tensor) -> dict[str, float]:
    """Metrics of step scores (B, R): mean probability that a step is right, mean over responses of the lowest
    one, and steps per response.
    """
    probabilities = (scores / process.weight).exp()
    return {
        "process/mean": probabilities[ends].mean().item(),
        "process/min": probabilities.masked_fill(~ends, 1.0).amin(1).mean().item(),
        "process/steps": ends.sum(1).float().mean().item(),
    }
