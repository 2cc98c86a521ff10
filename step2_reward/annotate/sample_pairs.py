"""Pairs for annotation: responses to each prompt, sampled from one or two policies.

    bash launch/sample_pairs.sh --model_name_or_path OUT1/final --prompt_data F.jsonl --output_dir DIR

writes DIR/pairs.jsonl for launch/annotate.sh.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

from common.data.batching import indices_of_round
from common.data.journal import to_lines, work_through
from common.data.multi_encoder import load_shared_records
from common.data.records import fraction
from common.generation.engine_checks import check_rollout_engine
from common.generation.generate import PolicyAnswer, fit_prompt_length, load_sampler, sample_answers
from common.model.roles import policy_config
from common.model.zero import load_inference_config
from common.runtime.distributed import gather_objects, init_distributed, log, rank
from common.runtime.files import write_text
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError, world_size
from common.runtime.process import run_main
from common.text.prompts import Prompt, tokenize_prompt
from common.text.record_formats import Record
from common.text.segments import find_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.run_folder import prepare_output
from step2_reward.annotate.options import SamplePairsOptions


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(SamplePairsOptions)
    paths, file = options.model_name_or_path, Path(options.output_dir) / "pairs.jsonl"
    if len(paths) > 2:
        raise UserError(f"--model_name_or_path {' '.join(paths)}: must be one model or two")
    if file.exists():
        raise UserError(
            f"--output_dir {options.output_dir}: holds {file.name} already; choose another folder"
        )
    zero = load_inference_config(options)
    for path in paths:
        config = policy_config(path, "model_name_or_path")
        options = fit_prompt_length(options, config)
        check_rollout_engine(options, config)
    encoders = [SegmentEncoder(load_tokenizer(path)) for path in paths]
    by_encoder = load_prompts(options, encoders)
    init_distributed()
    prepare_output(options, {f"tokenizer of policy {n}": e.tokenizer for n, e in enumerate(encoders, 1)})

    # 2. Sample from one policy after the other; resume from the journals.
    names = [paths[draw % len(paths)] for draw in range(options.responses_per_prompt)]
    answers: dict[int, list[PolicyAnswer]] = {}
    for first, (path, encoder, rows) in enumerate(zip(paths, encoders, by_encoder, strict=True)):
        draws = range(first, len(names), len(paths))
        load = partial(load_sampler, path, encoder, zero, options)
        answers |= responses_by_draw(load, encoder, rows, draws, options)

    # 3. Write the pairs.
    prompts = [find_prompt(row.record) for row in by_encoder[0]] if rank() == 0 else []
    by_prompt = [[answers[draw][number] for draw in range(len(names))] for number in range(len(prompts))]
    records = [
        pair
        for prompt, responses in zip(prompts, by_prompt, strict=True)
        for pair in pair_up(prompt, responses, names)
    ]
    possible = len(prompts) * len(names) * (len(names) - 1) // 2
    if not gather_objects(len(records))[0]:
        raise UserError("no pairs: the responses to each prompt are identical or empty")
    if rank() == 0:
        write_text(file, to_lines(records))
    log(f"{file}: {len(records)} pairs; {possible - len(records)} identical or empty ones dropped")
    flags = [record[name] for record in records for name in ("response_a_ended", "response_b_ended")]
    if not all(flags):
        log(
            f"{flags.count(False)} of {len(flags)} responses are truncated at --max_response_length"
            f" {options.max_response_length}; pairs.jsonl and the annotation page mark them"
        )


def load_prompts(options: SamplePairsOptions, encoders: Sequence[SegmentEncoder]) -> list[list[Prompt]]:
    """The prompts of the round, tokenised with each encoder, without those too long for any. Raises
    UserError.
    """
    convert = partial(tokenize_prompt, max_length=options.max_prompt_length, overlong="drop")
    converts = [partial(convert, encoder=encoder) for encoder in encoders]
    rows = load_shared_records(options.prompt_data, options, Prompt, converts, is_training=True).rows
    usable = range(len(rows[0]))
    if share := options.eval_fraction:  # the hash by which training holds out
        usable = [n for n in usable if fraction(find_prompt(rows[0][n].record), "") >= share]
    if not usable:
        raise UserError(f"--eval_fraction {share}: leaves out all {len(rows[0])} prompts")
    chosen = indices_of_round(len(usable), options.prompts_per_round, options.seed, options.round)
    return [[part[usable[index]] for index in chosen] for part in rows]


def responses_by_draw(
    load: Callable[[], Any], encoder: SegmentEncoder, rows: Sequence[Prompt], draws: Sequence[int],
    options: SamplePairsOptions,
) -> dict[int, list[PolicyAnswer]]:  # fmt: skip
    """Sample the responses of a policy; returns them by draw, on rank 0. Loads the policy only if needed."""
    policy, answers = cache(load), {}
    draws_before = options.responses_per_prompt * (options.round - 1)

    def respond(rows: Mapping[int, Prompt], draw: int) -> list[PolicyAnswer]:
        prompts = {number: row.ids for number, row in rows.items()}
        by_number = sample_answers(policy(), encoder, prompts, options, draws_before + draw)
        return [by_number[number] for number in rows]

    for draw in draws:
        log(f"response {draw + 1} of {options.responses_per_prompt} to {len(rows)} prompts")
        journal = Path(options.output_dir) / f"responses_{draw + 1}.journal"
        size = options.generation_batch_size * world_size()
        results = work_through(rows, partial(respond, draw=draw), journal, size, "prompts")
        answers[draw] = [PolicyAnswer(*one) for one in results]  # the journal holds lists
    return answers


def pair_up(prompt: str | list, answers: Sequence[PolicyAnswer], names: Sequence[str]) -> list[Record]:
    """Form all pairs of responses to a prompt that differ and are not empty."""
    if not isinstance(prompt, str):  # the template adds the space before a message
        answers = [answer._replace(text=answer.text.strip()) for answer in answers]
    return [
        {
            "prompt": prompt, "response_a": a.text, "response_b": b.text, "response_a_ended": a.ended,
            "response_b_ended": b.ended, "model_a": by_a, "model_b": by_b,
        }
        for (a, by_a), (b, by_b) in combinations(zip(answers, names, strict=True), 2)
        if a.text != b.text and a.text.strip() and b.text.strip()
    ]  # fmt: skip


if __name__ == "__main__":
    run_main(main)
