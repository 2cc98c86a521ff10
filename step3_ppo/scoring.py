"""Everything that the models say of sampled responses: log-probabilities, values and scores."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from common.data.batching import deal
from common.model.forward import last_positions, token_scores
from common.model.reward_ensemble import combine, member_scores
from common.runtime.distributed import device, gather_rows, rank, sum_tensor_over_ranks
from common.runtime.options import world_size
from common.text.conversation import PROBE, Segment
from common.text.prompts import Prompt
from common.text.segments import dialogue_segments, find_prompt
from common.text.tokenizer import SegmentEncoder
from step3_ppo.models import Models, Scorer
from step3_ppo.options import PPOOptions
from step3_ppo.reward_functions import function_scores
from step3_ppo.rollout import PolicyPass, Rollout, minibatches, policy_pass, take_rows


@dataclass
class FirstPass:
    """Forward passes over this rank's first micro-batch of the first minibatch, made with gradients.

    What they say is a part of the rollout, and the update begins with their gradients: the weights are the
    same, so the pass is made once. None: that model has still to make it. Taking a pass removes it, so that
    its memory is free as soon as its gradients are known.
    """

    policy: PolicyPass | None = None  # of the actor
    values: Tensor | None = None  # (N,) of the critic

    def take_policy(self) -> PolicyPass | None:
        taken, self.policy = self.policy, None
        return taken

    def take_values(self) -> Tensor | None:
        taken, self.values = self.values, None
        return taken


@torch.no_grad()
def score_rollout(
    models: Models, prompts: Sequence[Prompt], rollout: Rollout, options: PPOOptions,
    step: int | None = None, title: str = "",
) -> tuple[Rollout, FirstPass]:  # fmt: skip
    """Have every model and function read the responses, each rank a part of them.

    step: the iteration whose update follows; None measures all but values, for no update. title: of
    the progress lines of the reward models, none: be silent.
    """
    models.actor.eval()
    if models.critic:
        models.critic.eval()
    rest, first = _my_batches(rollout, options, step)
    batches = [*rest, first] if first else rest
    first_pass = FirstPass()

    def read(model: nn.Module, batch: list[int]) -> PolicyPass:
        return policy_pass(model, take_rows(rollout, batch), options.temperature)

    with models.reference_model() as reference:
        parts = [read(reference, batch).logprobs for batch in batches]
        found = {"ref_logprobs": _placed(rollout, batches, parts)}
    mine = sum(batches, [])
    size = options.generation_batch_size
    found["scores"], found["score_parts"] = score_responses(
        models.scorer, models.encoder, prompts, rollout, mine, size, title
    )
    if next(models.actor.module.parameters()).dtype != torch.float32:
        # In 16 bits, generation with a cache rounds otherwise than the update's forward pass: measure as the
        # update does.
        is_kept = bool(first) and step > options.critic_warmup_steps
        parts = [read(models.actor, batch).logprobs for batch in (rest if is_kept else batches)]
        if is_kept:
            with _as_in_update(models.actor):
                first_pass.policy = read(models.actor, first)
            parts.append(first_pass.policy.logprobs.detach())
        found["logprobs"] = _placed(rollout, batches, parts)
    if first and models.critic:
        passes = [_value_pass(models.critic, rollout, batch, options) for batch in rest]
        with _as_in_update(models.critic):
            first_pass.values, last = _value_pass(models.critic, rollout, first, options)
        passes.append((first_pass.values.detach(), last.detach()))
        found["values"] = _placed(rollout, batches, [values for values, _ in passes])
        found["last_values"] = gather_rows(torch.cat([last for _, last in passes]), mine, len(prompts))
    return replace(rollout, **found), first_pass


@torch.no_grad()
def score_responses(
    scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout, mine: Sequence[int],
    batch_size: int, title: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The score of each response, (B,), and its parts: of each reward model, then each function, (B, M + F).

    encoder: of the policy; mine: the rows that this rank asks for, of all that are shared out; title: of
    progress lines, none: be silent.
    """
    parts = [*_member_scores(scorer, encoder, prompts, rollout, mine, batch_size, title)]
    parts += [*_function_scores(scorer, encoder, prompts, rollout, mine)]
    whole = gather_rows(torch.stack(parts, 1), mine, len(prompts))  # (B, M + F)
    of_members, of_functions = whole[:, : len(scorer.rewards)], whole[:, len(scorer.rewards) :]
    scores = of_functions @ whole.new_tensor([function.weight for function in scorer.functions])
    return scores + combine(of_members.T, scorer.options) if scorer.rewards else scores, whole


def _value_pass(
    critic: Any, rollout: Rollout, batch: list[int], options: PPOOptions
) -> tuple[Tensor, Tensor]:
    """Values (N,) before each response token, and (b,) after the last one where --bootstrap_truncated wants
    it, else 0.
    """
    rows = take_rows(rollout, batch)
    wanted = ~rollout.ended[batch] & options.bootstrap_truncated  # (b,)
    prompts, responses = rollout.prompt_lengths[batch], rollout.response_lengths[batch]
    after = last_positions(prompts + responses, rows.input_ids.shape[1]) & wanted[:, None]  # (b, T)
    positions = rows.positions | after
    values = token_scores(critic, rows.input_ids, positions)
    is_after = after[positions]
    last = torch.zeros(len(batch), device=values.device).masked_scatter(wanted, values[is_after].detach())
    return values[~is_after], last


def _my_batches(rollout: Rollout, options: PPOOptions, step: int | None) -> tuple[list[list[int]], list[int]]:
    """This rank's rows in batches of like length, and apart from them its first micro-batch of the update."""
    lengths, micro = rollout.lengths.tolist(), options.micro_batch_size
    first: list[list[int]] = [[] for _ in range(world_size())]
    if step is not None:
        minibatch = next(minibatches(len(lengths), options.global_batch_size, 1, options.seed, step))
        first = [deal(minibatch, lengths, micro, r, world_size())[0] for r in range(world_size())]
    rest = sorted(set(range(len(lengths))) - {row for rows in first for row in rows}, key=lengths.__getitem__)
    mine, size = rest[rank() :: world_size()], options.generation_batch_size
    return [mine[start : start + size] for start in range(0, len(mine), size)], first[rank()]


@contextlib.contextmanager
def _as_in_update(engine: Any) -> Iterator[None]:
    """Passes keep what their gradients need, by recomputation where that is chosen."""
    engine.train()
    with torch.enable_grad():
        yield


def _placed(rollout: Rollout, batches: Sequence[list[int]], parts: Sequence[Tensor]) -> Tensor:
    """The (N,) numbers of each batch at their tokens' places, those of all ranks together: (B, R)."""
    mask = rollout.response_mask
    result = torch.zeros(mask.shape, device=mask.device)
    for batch, part in zip(batches, parts, strict=True):
        index = torch.tensor(batch, device=mask.device)
        block = torch.zeros(mask[index].shape, device=mask.device)
        block[mask[index]] = part
        result[index] = block
    return sum_tensor_over_ranks(result)


def _function_scores(
    scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout, mine: Sequence[int]
) -> Tensor:
    """What each of F functions of the user says of this rank's b rows: (F, b)."""
    if not scorer.functions:
        return torch.zeros(0)
    texts = [encoder.decode_response(rollout.prompt(row), rollout.reply(row)) for row in mine]
    records = [prompts[row].record for row in mine]
    said = function_scores(scorer.functions, [find_prompt(record) for record in records], texts, records)
    return torch.tensor(said, device=device())


def _member_scores(
    scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rollout: Rollout, mine: Sequence[int],
    batch_size: int, title: str,
) -> Tensor:  # fmt: skip
    """What each of M reward models says of this rank's b rows: (M, b)."""
    inputs = {
        e: [_scored_ids(e, encoder, prompts[row], rollout, row) for row in mine]
        for e in {member.encoder for member in scorer.rewards}
    }
    return member_scores(scorer.rewards, inputs, batch_size, title)


def _scored_ids(
    encoder: SegmentEncoder, of_policy: SegmentEncoder, prompt: Prompt, rollout: Rollout, row: int
) -> list[int]:
    """One prompt and response in a reward model's own tokens, with the end that replies have in its training
    data, up to EOS, where the score is read. A response that was cut off gets that end too, for scoring only:
    the reward model has never learnt to score elsewhere.
    """
    ids, source = rollout.prompt(row), find_prompt(prompt.record)
    if encoder is of_policy:
        closing = closing_ids(encoder, is_conversation=not isinstance(source, str))
        return ids + close(rollout.response(row), bool(rollout.ended[row]), closing)
    text = of_policy.decode_response(ids, rollout.reply(row))
    if not isinstance(source, str):
        text = text.strip()  # its own template decides about the space before a message
    segments = dialogue_segments(source, text, encoder.render, encoder.tokenizer.eos_token)
    return encoder.encode(segments)[0]


@cache
def closing_ids(encoder: SegmentEncoder, is_conversation: bool) -> list[int]:
    """What follows a reply in training data: EOS, in a conversation after what the chat template writes."""
    closing = Segment("", is_response=True, ends=True)
    if is_conversation:
        question = [{"role": "user", "content": PROBE}]
        with contextlib.suppress(ValueError):  # of a template that wants more than a question and a reply
            reply = dialogue_segments(question, PROBE, encoder.render, encoder.tokenizer.eos_token)[-1]
            closing = reply._replace(text=reply.text.partition(PROBE)[2])
    ids, is_closing = encoder.encode([Segment(""), closing])
    return [*compress(ids, is_closing)]


def close(response: list[int], has_ended: bool, closing: list[int]) -> list[int]:
    """The response with `closing` at its end. What it has of that already is not repeated; another token that
    ended it gives way.
    """
    for size in range(len(closing), 0, -1):
        if response[-size:] == closing[:size]:
            return response + closing[size:]
    return (response[:-1] if has_ended else response) + closing
