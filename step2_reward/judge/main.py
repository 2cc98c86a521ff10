"""Preferences of a model that compares two responses by a constitution.

    bash launch/judge.sh --model_name_or_path DIR_OR_HUB_ID --preference_data F.jsonl --output_dir DIR

writes DIR/preferences.jsonl for step 2, where `preference` is the probability that A is better, and
DIR/report.json: position bias, and agreement with people where the data has their labels. Sources: Bai et al.
2022 (Constitutional AI), section 4.1, for principles and the log-probabilities of answers as soft labels; Lee
et al. 2023 (RLAIF), section 2.1, for both orders.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.ai_feedback.constitution import (
    as_text,
    draw_principle,
    fill,
    load_assistant,
    read_constitution,
    read_template,
)
from common.data.batching import deal, pad_rows
from common.data.journal import to_lines, work_through
from common.data.records import warn_of_left_out
from common.generation.generate import load_policy
from common.model.forward import response_logits
from common.model.loading import longest_input
from common.model.roles import policy_config
from common.model.zero import load_zero_config
from common.runtime.distributed import device, init_distributed, log, rank, sum_tensor_over_ranks
from common.runtime.files import write_json, write_text
from common.runtime.option_parser import parse_options
from common.runtime.options import OptimiserOptions, UserError, world_size
from common.runtime.process import run_main
from common.text.conversation import Message
from common.text.prompts import tokenize_prompt
from common.text.record_formats import Record
from common.text.segments import dialogue_segments, prompt_segments
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped
from common.training.run_folder import prepare_output
from step2_reward.judge.options import JudgeOptions
from step2_reward.judge.pairs import read_pairs
from step2_reward.judge.report import debias, describe, measure, probability
from step2_reward.pairs import Pair, ended_fields

BATCHES = 16  # judged before the journal is written: the same ones on any number of ranks, so the same bytes
PLACES = ("prompt", "response_a", "response_b", "principle")


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(JudgeOptions)
    principles = read_constitution(options.constitution)
    template = read_template("judge_template", options.judge_template, PLACES)
    config = policy_config(options.model_name_or_path, "model_name_or_path")
    options.max_length = longest_input(config, options.max_length, "max_length")
    as_trained = OptimiserOptions(global_batch_size=world_size(), micro_batch_size=1)
    zero = load_zero_config(options.zero_config, as_trained, learning_rate=1.0)
    encoder = load_assistant(options)
    letters = letters_of(encoder, options.model_name_or_path)
    pairs = read_pairs(options.preference_data, options.skip_bad_records)
    pairs = pairs[: options.max_eval_samples or None]
    ask = partial(
        question_ids, encoder=encoder, letters=letters, principles=principles, template=template,
        options=options,
    )  # fmt: skip
    if not any(map(ask, pairs)):
        raise UserError(
            f"{' '.join(options.preference_data)}: no rows left: {len(pairs)} pairs: all longer than"
            f" --max_length {options.max_length}"
        )
    init_distributed(options.timeout_minutes)
    prepare_output(options, {"tokenizer": encoder.tokenizer})

    # 2. Some batches after the others; what an earlier run has done is kept.
    model = load_policy(options.model_name_or_path, encoder, zero)
    work = partial(
        judge, ask=ask, model=model, encoder=encoder, letters=letters, principles=principles, options=options
    )
    size = BATCHES * options.micro_batch_size // 2  # a pair is asked about twice
    records = work_through(pairs, work, Path(options.output_dir) / "journal", size, "pairs")

    # 3. What was found.
    if rank() == 0:
        write_results(records, Path(options.output_dir))


def question_ids(
    pair: Pair, encoder: SegmentEncoder, letters: Sequence[list[int]], principles: Sequence[str],
    template: str, options: JudgeOptions,
) -> list[list[int]]:  # fmt: skip
    """Token ids of the questions about a pair, A first and B first; nothing where one is too long."""
    room = options.max_length - max(map(len, letters)) + 1
    asked = questions(pair, draw_principle(principles, pair.id, options.seed), template)
    with contextlib.suppress(Dropped):
        return [tokenize_prompt({"prompt": question}, encoder, room, "drop")[0].ids for question in asked]
    return []


def judge(
    pairs: Mapping[int, Pair], ask: Callable[[Pair], list[list[int]]], model: nn.Module,
    encoder: SegmentEncoder, letters: Sequence[list[int]], principles: Sequence[str], options: JudgeOptions,
) -> list[Record]:  # fmt: skip
    """A record for each pair, without judgement where its questions do not fit."""
    drawn = {place: draw_principle(principles, pair.id, options.seed) for place, pair in pairs.items()}
    asked = {place: ids for place, pair in pairs.items() if (ids := ask(pair))}
    found = {}
    if asked:
        logprobs = answer_logprobs(
            model, [*chain(*asked.values())], letters, options.micro_batch_size,
            encoder.tokenizer.pad_token_id,
        ).view(len(asked), 2, 2)  # (pairs, orders, letters)  # fmt: skip
        found = dict(zip(asked, logprobs.numpy(), strict=True))
    return [judged(pair, drawn[place], found.get(place)) for place, pair in pairs.items()]


def questions(pair: Pair, principle: str, template: str) -> list[list[Message]]:
    """The pair with response A first, and with response B first."""
    a, b = (as_text(pair.responses[side]) for side in "AB")
    texts = {"prompt": as_text(pair.prompt), "principle": principle}
    return [
        fill(template, response_a=first, response_b=second, **texts) for first, second in ((a, b), (b, a))
    ]


def letters_of(encoder: SegmentEncoder, path: str) -> list[list[int]]:
    """Token ids of A and of B as the beginning of a reply, as the chat template and the tokenizer have it.

    Raises UserError for a tokenizer that does not tell them apart, and for a template that does not say.
    """
    found, question = [], [{"role": "user", "content": "A or B?"}]
    eos = encoder.tokenizer.eos_token
    for letter in "AB":
        try:
            *before, reply = dialogue_segments(question, letter, encoder.render, eos)
            if before != prompt_segments(question, encoder.render, eos):
                raise ValueError("its chat template opens something else, such as <think>, before an answer")
        except ValueError as error:
            raise UserError(f"--model_name_or_path {path}: cannot be asked for a letter: {error}") from None
        segments = [*before, reply._replace(text=reply.text.rstrip(), ends=False)]
        ids = zip(*encoder.encode(segments), strict=True)
        found.append([token for token, is_reply in ids if is_reply])
    if found[0] == found[1]:
        raise UserError(f"--model_name_or_path {path}: its tokenizer does not tell the letters A and B apart")
    return found


@torch.no_grad()
def answer_logprobs(
    model: nn.Module, asked: Sequence[list[int]], answers: Sequence[list[int]], micro_batch: int,
    pad_token_id: int,
) -> Tensor:  # fmt: skip
    """Log-probability of each answer after each question, summed over its tokens: (N, A) fp64 on the CPU.

    Token ids in. Answers that differ in their last token alone take one forward pass. Each rank does its
    part, and gets all.
    """
    found = torch.zeros(len(asked), len(answers), dtype=torch.float64)
    for begin in {tuple(answer[:-1]): None for answer in answers}:
        rows = [[*ids, *begin] for ids in asked]
        columns = [n for n, answer in enumerate(answers) if tuple(answer[:-1]) == begin]
        for picked in deal(range(len(rows)), [*map(len, rows)], micro_batch, rank(), world_size()):
            # A rank without rows in the last round still takes part in it: at ZeRO-3 a forward needs all.
            ids = [rows[i] for i in picked or [0]]
            input_ids = pad_rows(ids, pad_token_id).to(device())  # (B, T)
            ends = torch.tensor([*map(len, ids)], device=device())[:, None]
            places = torch.arange(input_ids.shape[1], device=device())
            is_asked = (places < ends) & (places >= ends - len(begin) - 1)  # (B, T) before each answer token
            logprobs = response_logits(model, input_ids, is_asked).float().log_softmax(-1)
            logprobs = logprobs.view(len(ids), len(begin) + 1, -1)  # (B, K, V)
            for n in columns if picked else ():
                found[picked, n] = logprobs[:, range(len(answers[n])), answers[n]].sum(-1).double().cpu()
    return sum_tensor_over_ranks(found.to(device())).cpu()


def judged(pair: Pair, principle: str, logprobs: np.ndarray | None) -> Record:
    """What step 2 reads, and what led to it. logprobs (2, 2): of A and B, with response A first, then B."""
    judgement, preference = None, None
    if logprobs is not None:
        odds = logprobs[:, 0] - logprobs[:, 1]  # (2,) of what is shown first
        a_first, b_first = odds[0], -odds[1]
        judgement = {
            "principle": principle,
            "log_odds_a_first": round(float(a_first), 5),
            "log_odds_b_first": round(float(b_first), 5),
            "letters": round(float(np.exp(logprobs).sum(1).mean()), 5),
        }
        preference = round(float(probability(debias(a_first, b_first)[0])), 5)
    return {
        "prompt": pair.prompt,
        "response_a": pair.responses["A"],
        "response_b": pair.responses["B"],
        **ended_fields(pair),
        "preference": preference,
        "human": pair.answer or None,
        "judge": judgement,
    }


def write_results(records: Sequence[Record], folder: Path) -> None:
    """The preferences, and figures about the judge."""
    write_text(folder / "preferences.jsonl", to_lines([record for record in records if record["judge"]]))
    figures = measure(records)
    write_json(folder / "report.json", figures)
    log(f"\n{describe(figures)}\n\npreferences.jsonl and report.json: {folder}")
    warn_of_left_out(sum(not record["judge"] for record in records), len(records), "pairs")


if __name__ == "__main__":
    run_main(main)
