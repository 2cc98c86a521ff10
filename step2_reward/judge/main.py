"""AI preferences: a model compares two responses by a constitution.

    bash launch/judge.sh --model_name_or_path DIR_OR_HUB_ID --preference_data F.jsonl --output_dir DIR

writes DIR/preferences.jsonl for step 2, where `preference` is the probability that A is better, and
DIR/report.json: position bias, and agreement with people where the data has their labels. Sources: Bai et al.
2022 (Constitutional AI), section 4.1, for principles and soft labels from log-probabilities; Lee et al. 2023
(RLAIF), section 2.1, for judging in both orders.
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
from common.data.batching import batches_of_rank, pad_rows
from common.data.journal import to_lines, work_through
from common.data.records import warn_of_left_out
from common.generation.generate import load_policy
from common.model.forward import pad_token_id, response_logits
from common.model.loading import fit_to_model
from common.model.roles import policy_config
from common.model.zero import load_inference_config
from common.runtime.distributed import device, init_distributed, log, rank, sum_tensor_over_ranks
from common.runtime.files import write_json, write_text
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import run_main
from common.text.conversation import Message
from common.text.prompts import tokenize_prompt
from common.text.record_formats import Record
from common.text.segments import dialogue_segments, prompt_segments
from common.text.tokenizer import SegmentEncoder
from common.text.truncation import Dropped
from common.training.run_folder import prepare_output
from step2_reward.judge.options import JudgeOptions
from step2_reward.judge.pairs import read_judge_pairs
from step2_reward.judge.report import debias, format_judge_metrics, judge_metrics, probability
from step2_reward.pairs import Pair, ended_fields

BATCHES = 16  # micro-batches per journal entry; does not depend on the ranks, so that the bytes do not either
FIELDS = ("prompt", "response_a", "response_b", "principle")


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(JudgeOptions)
    principles = read_constitution(options.constitution)
    template = read_template("judge_template", options.judge_template, FIELDS)
    config = policy_config(options.model_name_or_path, "model_name_or_path")
    options = fit_to_model(options, config)
    zero = load_inference_config(options)
    encoder = load_assistant(options)
    letters = letter_ids(encoder, options.model_name_or_path)
    pairs = read_judge_pairs(options.preference_data, options.skip_bad_records)
    pairs = pairs[: options.max_eval_samples or None]
    encode_questions = partial(
        question_ids, encoder=encoder, letters=letters, principles=principles, template=template,
        options=options,
    )  # fmt: skip
    if not any(map(encode_questions, pairs)):
        raise UserError(
            f"{' '.join(options.preference_data)}: no rows left: {len(pairs)} pairs: all longer than"
            f" --max_length {options.max_length}"
        )
    init_distributed(options.timeout_minutes)
    prepare_output(options, {"tokenizer": encoder.tokenizer})

    # 2. Judge some batches at a time; resume from the journal.
    model = load_policy(options.model_name_or_path, encoder, zero)
    work = partial(
        judge_pairs, encode_questions=encode_questions, model=model, letters=letters,
        principles=principles, options=options,
    )  # fmt: skip
    size = BATCHES * options.micro_batch_size // 2  # two questions per pair
    records = work_through(pairs, work, Path(options.output_dir) / "journal", size, "pairs")

    # 3. Write the results.
    if rank() == 0:
        write_results(records, Path(options.output_dir))


def question_ids(
    pair: Pair, encoder: SegmentEncoder, letters: Sequence[list[int]], principles: Sequence[str],
    template: str, options: JudgeOptions,
) -> list[list[int]]:  # fmt: skip
    """Tokenise the questions about a pair, A first and B first; empty where one is too long."""
    max_length = options.max_length - max(map(len, letters)) + 1
    messages = questions(pair, draw_principle(principles, pair.id, options.seed), template)
    with contextlib.suppress(Dropped):
        return [
            tokenize_prompt({"prompt": question}, encoder, max_length, "drop")[0].ids for question in messages
        ]
    return []


def judge_pairs(
    pairs: Mapping[int, Pair], encode_questions: Callable[[Pair], list[list[int]]], model: nn.Module,
    letters: Sequence[list[int]], principles: Sequence[str], options: JudgeOptions,
) -> list[Record]:  # fmt: skip
    """Judge pairs; the records of pairs with overlong questions have no judgement."""
    drawn = {index: draw_principle(principles, pair.id, options.seed) for index, pair in pairs.items()}
    question_pairs = {index: ids for index, pair in pairs.items() if (ids := encode_questions(pair))}
    logprobs = {}
    if question_pairs:
        values = answer_logprobs(
            model, [*chain(*question_pairs.values())], letters, options.micro_batch_size
        ).view(len(question_pairs), 2, 2)  # (pairs, orders, letters)
        logprobs = dict(zip(question_pairs, values.numpy(), strict=True))
    return [judgement_record(pair, drawn[index], logprobs.get(index)) for index, pair in pairs.items()]


def questions(pair: Pair, principle: str, template: str) -> list[list[Message]]:
    """Fill the template with response A first, and with response B first."""
    a, b = (as_text(pair.responses[side]) for side in "AB")
    texts = {"prompt": as_text(pair.prompt), "principle": principle}
    return [
        fill(template, response_a=first, response_b=second, **texts) for first, second in ((a, b), (b, a))
    ]


def letter_ids(encoder: SegmentEncoder, path: str) -> list[list[int]]:
    """Tokenise A and B as the start of a reply, by chat template and tokenizer.

    Raises UserError if both have the same token ids, or the template inserts text before a reply.
    """
    letters, question = [], [{"role": "user", "content": "A or B?"}]
    eos = encoder.tokenizer.eos_token
    for letter in "AB":
        try:
            *before, reply = dialogue_segments(question, letter, encoder.render, eos)
            if before != prompt_segments(question, encoder.render, eos):
                raise ValueError("its chat template inserts text, such as <think>, before a reply")
        except ValueError as error:
            raise UserError(f"--model_name_or_path {path}: cannot answer with a letter: {error}") from None
        segments = [*before, reply._replace(text=reply.text.rstrip(), ends=False)]
        ids = zip(*encoder.encode(segments), strict=True)
        letters.append([token for token, is_reply in ids if is_reply])
    if letters[0] == letters[1]:
        raise UserError(f"--model_name_or_path {path}: its tokenizer encodes the letters A and B alike")
    return letters


@torch.no_grad()
def answer_logprobs(
    model: nn.Module, question_rows: Sequence[list[int]], answers: Sequence[list[int]], micro_batch: int
) -> Tensor:
    """Compute the log-probability of each answer after each question: (N, A) fp64 on the CPU.

    Questions and answers are token ids. Answers that differ only in their last token share a forward pass.
    Each rank computes its share, and returns all.
    """
    result = torch.zeros(len(question_rows), len(answers), dtype=torch.float64)
    for prefix in {tuple(answer[:-1]): None for answer in answers}:
        rows = [[*ids, *prefix] for ids in question_rows]
        columns = [n for n, answer in enumerate(answers) if tuple(answer[:-1]) == prefix]
        for batch_indices, is_real in batches_of_rank([*map(len, rows)], micro_batch):
            ids = [rows[i] for i in batch_indices]
            input_ids = pad_rows(ids, pad_token_id(model)).to(device())  # (B, T)
            ends = torch.tensor([*map(len, ids)], device=device())[:, None]
            positions = torch.arange(input_ids.shape[1], device=device())
            predicts = (positions < ends) & (positions >= ends - len(prefix) - 1)  # (B, T) an answer token
            logprobs = response_logits(model, input_ids, predicts).float().log_softmax(-1)
            logprobs = logprobs.view(len(ids), len(prefix) + 1, -1)  # (B, K, V)
            for n in columns if is_real else ():
                sums = logprobs[:, range(len(answers[n])), answers[n]].sum(-1)  # (B,)
                result[batch_indices, n] = sums.double().cpu()
    return sum_tensor_over_ranks(result.to(device())).cpu()


def judgement_record(pair: Pair, principle: str, logprobs: np.ndarray | None) -> Record:
    """Make a record for step 2, with its judgement. logprobs (2, 2): of A and B, with A first and B first."""
    judgement, preference = None, None
    if logprobs is not None:
        log_odds = logprobs[:, 0] - logprobs[:, 1]  # (2,) of the response shown first
        a_first, b_first = log_odds[0], -log_odds[1]
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
    """Write the preferences and report.json."""
    write_text(folder / "preferences.jsonl", to_lines([record for record in records if record["judge"]]))
    metrics = judge_metrics(records)
    write_json(folder / "report.json", metrics)
    log(f"\n{format_judge_metrics(metrics)}\n\npreferences.jsonl and report.json: {folder}")
    warn_of_left_out(sum(not record["judge"] for record in records), len(records), "pairs")


if __name__ == "__main__":
    run_main(main)
