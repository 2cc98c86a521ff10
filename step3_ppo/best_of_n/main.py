"""Rejection sampling: draw and score n responses per prompt; write the best as data for steps 1 and 2.

    bash launch/best_of_n.sh --model_name_or_path OUT1/final --prompt_data F.jsonl \
        --reward_model_name_or_path OUT2/final --output_dir DIR

Writes samples.jsonl, demonstrations.jsonl, preferences.jsonl and report.json. Running the same command again
resumes after the last complete chunk of prompts, or repeats the selection when sampling is done.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from common.data.batching import indices_of_round
from common.data.examples import Examples
from common.data.journal import stop_resumably, to_lines
from common.data.loading import load_examples
from common.generation.engine_checks import check_rollout_engine
from common.generation.generate import Sampler, fit_prompt_length, generate, load_sampler, prompts_of_rank
from common.generation.guidance import check_guidance
from common.model.reward_ensemble import load_encoders, load_members
from common.model.roles import policy_config
from common.model.shared_prompt import Sharing
from common.model.zero import load_inference_config
from common.runtime.distributed import init_distributed, log, on_first_rank, ranks_in_words
from common.runtime.files import append_text, make_folder
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError, world_size
from common.runtime.process import run_main, stop_between_steps
from common.runtime.progress import Progress
from common.text.prompts import Prompt, tokenize_prompt
from common.text.segments import find_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.run_folder import prepare_output
from step3_ppo.best_of_n.files import Sample, select, truncate_to_chunks
from step3_ppo.best_of_n.options import BestOfNOptions
from step3_ppo.best_of_n.report import describe_selection
from step3_ppo.models import Scorer
from step3_ppo.process_rewards import check_process, load_process_model, step_probabilities
from step3_ppo.reward_functions import load_functions
from step3_ppo.rollout import Rollout, assemble
from step3_ppo.scoring import score_responses
from step3_ppo.shared_prompt import is_less_work


def main() -> None:
    # 1. Check options and data before a model is loaded.
    options = parse_options(BestOfNOptions)
    zero = load_inference_config(options)
    config = policy_config(options.model_name_or_path, "model_name_or_path")
    options = fit_prompt_length(options, config)
    check_rollout_engine(options, config)
    check_guidance([options.model_name_or_path], options, options.rollout_engine)
    hidden_size = config.get_text_config().hidden_size
    functions = load_functions(options.reward_function, "reward_function")
    if taken := [f.title for f in functions if f.name == "process" or f.name.startswith("reward_model_")]:
        raise UserError(f"{taken[0]}: a score in samples.jsonl has this name; rename the function")
    encoder = SegmentEncoder(load_tokenizer(options.model_name_or_path))
    reward_encoders = load_encoders(options, encoder)
    check_process(options, encoder, options.max_prompt_length + options.max_response_length)
    prompts = load_prompts(options, encoder)
    if options.selection_dir:
        make_folder("selection_dir", options.selection_dir)
    init_distributed(options.timeout_minutes)
    tokenizers = {f"tokenizer of reward model {n}": e.tokenizer for n, e in enumerate(reward_encoders, 1)}
    prepare_output(options.sampling, {"tokenizer": encoder.tokenizer, **tokenizers})

    # 2. Sample in chunks of one batch per rank. Each chunk is written before the next one starts.
    size, total = options.samples_per_prompt, len(prompts)
    chunk = math.ceil(options.generation_batch_size * world_size() / size)
    file = Path(options.output_dir) / "samples.jsonl"
    done = on_first_rank(truncate_to_chunks, file, chunk * size, total * size) // size
    start = f"; resuming: {done} of {total} prompts done" if done else ""
    log(f"{total} prompts, {size} responses per prompt, on {ranks_in_words()}{start}")
    if done < total:
        policy = load_sampler(options.model_name_or_path, encoder, zero, options, ilql_beta=options.ilql_beta)
        members = load_members(options, reward_encoders, zero)
        process = load_process_model(options, encoder, zero, aggregation=options.process_aggregation)
        scorer = Scorer(members, functions, options, process)
    progress, start, tokens = Progress("prompts", total, done), time.perf_counter(), 0
    while done < total:
        stop_resumably(f"{done} of {total} prompts done", options.output_dir)
        end = min(done + chunk, total)
        rows = range(done * size, end * size)
        samples = sample_and_score(policy, scorer, encoder, prompts, rows, options, hidden_size)
        on_first_rank(append_text, file, to_lines(samples))
        done, tokens = end, tokens + sum(sample["length"] for sample in samples)
        score, seconds = fmean(sample["score"] for sample in samples), time.perf_counter() - start
        progress.update(done, f"score {score:.3f} | {tokens / seconds:.0f} tokens/s")

    # 3. Select demonstrations and preferences for the other steps.
    stop_between_steps()  # rank 0 writes, the others wait for it
    report = on_first_rank(select, options)
    log(f"{describe_selection(report)}\nwrote {options.selection_dir or options.output_dir}")


def load_prompts(options: BestOfNOptions, encoder: SegmentEncoder) -> Examples[Prompt]:
    """The prompts of the round, from the training part of the data. Raises UserError."""
    convert = partial(
        tokenize_prompt, encoder=encoder, max_length=options.max_prompt_length, overlong=options.overlong
    )
    prompts, _ = load_examples(options.prompt_data, options, Prompt, convert)
    chosen = indices_of_round(len(prompts), options.prompts_per_round, options.seed, options.round)
    return prompts.take(np.array(chosen))


class RowIds(Sequence[list[int]]):
    """Prompt token ids of each row of the round; every prompt has `size` rows."""

    def __init__(self, prompts: Sequence[Prompt], size: int) -> None:
        self._prompts, self._size = prompts, size

    def __len__(self) -> int:
        return len(self._prompts) * self._size

    def __getitem__(self, row: int) -> list[int]:
        return self._prompts[row // self._size].ids


def sample_and_score(
    policy: Sampler, scorer: Scorer, encoder: SegmentEncoder, prompts: Sequence[Prompt], rows: range,
    options: BestOfNOptions, hidden_size: int,
) -> list[Sample]:  # fmt: skip
    """Sample and score some rows of the round. Each rank draws a part; every rank gets all of them.

    A response depends on the row's number in the round, not on the other rows of the batch. Reward models
    read a prompt once for several of its responses, where that is less work for a model of this hidden size.
    Raises UserError for a score that is not a finite number.
    """
    size = options.samples_per_prompt
    numbers = [*rows, *[rows[0]] * (-len(rows) % world_size())]  # padded: each rank draws as many
    row_prompts = [prompts[number // size] for number in numbers]
    rank_rows = prompts_of_rank([prompt.ids for prompt in row_prompts])
    responses = generate(
        policy, encoder, RowIds(prompts, size), [numbers[i] for i in rank_rows], options, options.round
    )
    # What could be drawn is large, and only used by updates.
    sizes = torch.zeros_like(responses.support_sizes)
    responses = responses._replace(support_sizes=sizes, support_ids=responses.support_ids[:0])
    rollout = assemble(row_prompts, rank_rows, responses, encoder)
    together = (
        math.gcd(size, options.generation_batch_size, len(rank_rows)) if len(numbers) == len(rows) else 1
    )
    sharing = Sharing(together, options.max_prompt_length, options.max_response_length)
    if is_less_work(rollout, sharing, hidden_size, "auto"):
        rollout = replace(rollout, sharing=sharing)
    scored = score_responses(scorer, encoder, row_prompts, rollout, rank_rows, options.generation_batch_size)
    scores, parts = scored.scores, scored.score_parts
    if bad := int((~scores.isfinite()).sum()):
        raise UserError(f"--reward_model_name_or_path: {bad} scores are not finite numbers")
    names = [f"reward_model_{number + 1}" for number in range(len(scorer.rewards))]
    names += [function.name for function in scorer.functions] + ["process"] * (scorer.process is not None)
    return [
        to_sample(rollout, row, numbers[row] // size, row_prompts[row], encoder)
        | {"score": round(scores[row].item(), 6)}
        | ({"scores": dict(zip(names, row_parts, strict=True))} if len(names) > 1 else {})
        | ({"steps": step_probabilities(scorer.process, *steps)} if scorer.process else {})
        for row, row_parts, *steps in zip(
            range(len(rows)), parts.tolist(), scored.step_scores, scored.step_ends, strict=False
        )
    ]


def to_sample(
    rollout: Rollout, row: int, group: int, prompt: Prompt, encoder: SegmentEncoder
) -> dict[str, Any]:
    """A response as a demonstration, with the index of its prompt, its length, and whether it ended."""
    source = find_prompt(prompt.record)
    text = encoder.decode_response(rollout.prompt(row), rollout.reply(row))
    return {
        "group": group,
        "prompt": source,
        # The chat template adds the space before a message.
        "completion": text if isinstance(source, str) else text.strip(),
        "length": int(rollout.response_lengths[row]),
        "ended": bool(rollout.ended[row]),
    }


if __name__ == "__main__":
    run_main(main)
