"""Policies compared on the same held-out prompts: scores, wins, KL, variety, forgetting, and best-of-n.

    bash launch/evaluate_ppo.sh --model_name_or_path OUT1/final OUT3/final --prompt_data F.jsonl \
        --reward_model_name_or_path OUT2/final --output_dir DIR
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.data.cache import Convert
from common.data.columns import Row
from common.data.loading import load_examples
from common.data.summary import warn_of_few
from common.generation.generate import check_generation
from common.model.loading import longest_input
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import load_encoders, same_tokenizer
from common.model.roles import check_scalar_model, policy_config
from common.model.zero import load_zero_config
from common.runtime.distributed import init_distributed, log, rank, ranks_in_words
from common.runtime.files import make_folder, write_json
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError, world_size
from common.runtime.process import UNWRITTEN, report_accepted, run_main, stop_anywhere, stop_between_steps
from common.text.prompts import Prompt, tokenize_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step3_ppo.compare import statistics as compare
from step3_ppo.compare.options import EvaluateOptions
from step3_ppo.compare.report import picture, table
from step3_ppo.compare.responses import Judge, Policy, sample_all, score
from step3_ppo.metrics import describe_responses
from step3_ppo.options import PPOOptions
from step3_ppo.ptx import Text, text
from step3_ppo.reward_functions import load_functions
from step3_ppo.rollout import Rollout


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(EvaluateOptions)
    as_trained = PPOOptions(global_batch_size=world_size(), micro_batch_size=1)
    zero = load_zero_config(options.zero_config, as_trained, as_trained.actor_learning_rate)
    for path in options.model_name_or_path:
        config = policy_config(path, "model_name_or_path")
        check_generation(options, config)
        options.max_length = longest_input(config, options.max_length, "max_length")
    encoder = load_encoder(options.model_name_or_path)
    judges = load_judges(options, encoder)
    prompts = load_prompts(options, encoder)
    texts = load_demonstrations(options, encoder)
    output = make_folder("output_dir", options.output_dir)
    init_distributed()
    report_accepted()
    stop_anywhere(UNWRITTEN)
    log(f"{len(prompts)} held-out prompts on {ranks_in_words()}")

    # 2. One policy after the other, then one judge after the other. Every rank has as many rows.
    rows = [*prompts, *prompts[:1] * (-len(prompts) % world_size())]
    policies = sample_all(options, encoder, rows, texts, zero)
    scores = {judge.name: score(judge, policies, encoder, rows, options, zero) for judge in judges}

    # 3. What was found.
    stop_between_steps()
    write_report(measure(policies, scores, len(prompts)), output)


def load_encoder(paths: Sequence[str]) -> SegmentEncoder:
    """What all policies read and write. Raises UserError when one has other tokens than the first."""
    first, *others = (load_tokenizer(path) for path in paths)
    for path, tokenizer in zip(paths[1:], others, strict=True):
        if not same_tokenizer(first, tokenizer):
            raise UserError(
                f"--model_name_or_path {path}: its tokenizer or chat template is not that of {paths[0]};"
                " policies are compared on the same tokens"
            )
    return SegmentEncoder(first)


def load_judges(options: EvaluateOptions, encoder: SegmentEncoder) -> list[Judge]:
    """Who scores, the proxy first, gold last; names with a space are no function's. Raises UserError."""
    functions = load_functions(options.reward_function, "reward_function")
    judges = [Judge(function.name, EnsembleOptions(), [], [function]) for function in functions]
    if options.reward_model_name_or_path:
        judges.insert(0, Judge("reward model", options, load_encoders(options, encoder), []))
    if options.gold_reward_model:
        check_scalar_model(options.gold_reward_model, "gold_reward_model")
    gold = EnsembleOptions(list(filter(None, [options.gold_reward_model])))
    gold_functions = load_functions(list(filter(None, [options.gold_function])), "gold_function")
    if gold.reward_model_name_or_path or gold_functions:
        judges.append(Judge("gold score", gold, load_encoders(gold, encoder), gold_functions))
    return judges


def load_prompts(options: EvaluateOptions, encoder: SegmentEncoder) -> list[Prompt]:
    """All prompts of --eval_data, or those of --prompt_data that training holds out. Raises UserError."""
    convert = partial(
        tokenize_prompt, encoder=encoder, max_length=options.max_prompt_length, overlong=options.overlong
    )
    held_out = load_held_out(options.eval_data, options.prompt_data, options, Prompt, convert)
    if len(held_out) < 2:
        sources = " ".join(options.eval_data or options.prompt_data)
        raise UserError(f"{sources}: {len(held_out)} held-out prompts; a comparison needs at least 2")
    return held_out


def load_demonstrations(options: EvaluateOptions, encoder: SegmentEncoder) -> list[Text]:
    """Demonstrations that fit, in the same way. Raises UserError for a bad record, and when none is left."""
    sources = options.eval_demonstration_data or options.demonstration_data
    if not sources:
        return []
    convert = partial(text, encoder=encoder, max_length=options.max_length, overlong="drop")
    all_stages = replace(options, data_split="")
    found = load_held_out(
        options.eval_demonstration_data, options.demonstration_data, all_stages, Text, convert
    )
    if not found:
        raise UserError(f"{' '.join(sources)}: no demonstrations left to measure on")
    return found


def load_held_out(
    whole: Sequence[str], parted: Sequence[str], options: EvaluateOptions, row_class: type[Row],
    convert: Convert,
) -> list[Row]:  # fmt: skip
    """All rows of the files that are used whole, else those that training on the others holds out."""
    if not whole:
        return load_examples(parted, replace(options, eval_data=[]), row_class, convert)[1]
    everything = replace(options, eval_data=[], eval_fraction=0.0, data_split="")
    rows, _ = load_examples(whole, everything, row_class, convert, is_training=False)
    rows = rows.take(slice(options.max_eval_samples or None))
    warn_of_few(rows.notes("held_out").tolist())
    return list(rows)


def measure(policies: Sequence[Policy], scores: dict[str, list[np.ndarray]], count: int) -> dict[str, Any]:
    """All figures on the first `count` prompts, ready for JSON; scores by judge, the proxy first.

    Each policy is compared with every one before it, in the same order.
    """
    rollouts = [_cut(policy.rollouts[0], count) for policy in policies]
    lengths = [rollout.response_lengths.cpu().numpy() for rollout in rollouts]
    told: list[dict[str, np.ndarray]] = []  # scores of each policy by judge, (count,)
    found = []
    for number, (policy, rollout) in enumerate(zip(policies, rollouts, strict=True)):
        ours = {name: said[number][0, :count] for name, said in scores.items()}
        for other, theirs in zip(rollouts, told, strict=False):
            # What both policies say is a tie, however rounding in another batch has changed its score.
            alike = np.array([rollout.response(row) == other.response(row) for row in range(count)])
            ours = {name: np.where(alike, theirs[name], values) for name, values in ours.items()}
        against = [
            {name: compare.wins(ours[name], theirs[name], lengths[number] - lengths[other]) for name in ours}
            for other, theirs in enumerate(told)
        ]
        told.append(ours)
        found.append({
            "model": policy.path,
            "scores": {name: compare.mean(values) for name, values in ours.items()},
            "kl": compare.mean((policy.logprobs - policy.ref_logprobs)[:count].cpu().numpy()),
            **describe_responses(rollout),
            "perplexity": policy.perplexity,
            "against": against,
        })  # fmt: skip
    samples = {name: said[0][:, :count].T for name, said in scores.items()}  # (P, D)
    return {"prompts": count, "policies": found, "best_of": best_of_curve(samples)}


def best_of_curve(samples: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Best of 1, 2, 4, ... responses of one policy by the first judge: scores (P, D) by judge."""
    proxy = next(iter(samples.values()))
    return [
        {
            "n": n,
            "kl": compare.best_of_kl(n),
            "scores": {name: compare.mean(compare.best_of(proxy, said, n)) for name, said in samples.items()},
        }
        for n in (2**k for k in range(proxy.shape[1].bit_length()))
    ]


def write_report(figures: dict[str, Any], folder: Path) -> None:
    """Print the figures, and on rank 0 write report.json and the picture to a folder."""
    log(f"\n{table(figures)}")
    if rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", figures)
    picture(figures).savefig(folder / "scores.png", dpi=150)
    log(f"\nreport.json and scores.png: {folder}")


def _cut(rollout: Rollout, count: int) -> Rollout:
    return Rollout(**{name: value[:count] for name, value in vars(rollout).items()})


if __name__ == "__main__":
    run_main(main)
