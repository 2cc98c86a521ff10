"""Compare policies on held-out prompts: scores, win rates, KL, diversity, forgetting, and best of n.

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
from common.generation.engine_checks import check_rollout_engine
from common.generation.generate import fit_prompt_length
from common.generation.guidance import check_guidance
from common.model.loading import fit_to_model
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import load_encoders, same_tokenizer
from common.model.roles import check_scalar_model, policy_config
from common.model.zero import load_inference_config
from common.runtime.distributed import init_distributed, log, rank, ranks_in_words
from common.runtime.files import make_folder, naming, write_json
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError, world_size
from common.runtime.process import UNWRITTEN, report_accepted, run_main, stop_anywhere, stop_between_steps
from common.text.prompts import Prompt, tokenize_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.text.truncation import MaskedText, fit_demonstration
from step3_ppo.compare import statistics
from step3_ppo.compare.options import ComparePoliciesOptions
from step3_ppo.compare.report import plot_scores, table
from step3_ppo.compare.responses import Judge, Policy, sample_all, score
from step3_ppo.metrics import describe_responses
from step3_ppo.reward_functions import load_functions


def main() -> None:
    # 1. Check options and data before a model is loaded.
    options = parse_options(ComparePoliciesOptions)
    zero = load_inference_config(options)
    for path in options.model_name_or_path:
        config = policy_config(path, "model_name_or_path")
        options = fit_prompt_length(options, config)
        check_rollout_engine(options, config)
        options = fit_to_model(options, config)
    check_guidance(options.model_name_or_path, options, options.rollout_engine)
    encoder = load_encoder(options.model_name_or_path)
    judges = load_judges(options, encoder)
    prompts = load_prompts(options, encoder)
    texts = load_demonstrations(options, encoder)
    output = make_folder("output_dir", options.output_dir)
    init_distributed()
    report_accepted()
    stop_anywhere(UNWRITTEN)
    log(f"{len(prompts)} held-out prompts on {ranks_in_words()}")

    # 2. Run one policy after the other, then one judge after the other.
    rows = [*prompts, *prompts[:1] * (-len(prompts) % world_size())]  # padded: every rank has as many
    policies = sample_all(options, encoder, rows, texts, zero)
    scores = {judge.name: score(judge, policies, encoder, rows, options, zero) for judge in judges}

    # 3. Report.
    stop_between_steps()
    write_report(compare_policies(policies, scores, len(prompts)), output)


def load_encoder(paths: Sequence[str]) -> SegmentEncoder:
    """The tokenizer of all policies. Raises UserError when one of them has another tokenizer."""
    first, *others = (load_tokenizer(path) for path in paths)
    for path, tokenizer in zip(paths[1:], others, strict=True):
        if not same_tokenizer(first, tokenizer):
            raise UserError(
                f"--model_name_or_path {path}: its tokenizer or chat template is not that of {paths[0]};"
                " all policies must have the same one"
            )
    return SegmentEncoder(first)


def load_judges(options: ComparePoliciesOptions, encoder: SegmentEncoder) -> list[Judge]:
    """The judges, the proxy reward model first, gold last. Their names contain a space, so they differ from
    those of functions. Raises UserError.
    """
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


def load_prompts(options: ComparePoliciesOptions, encoder: SegmentEncoder) -> list[Prompt]:
    """All prompts of --eval_data, or the held-out prompts of --prompt_data. Raises UserError."""
    convert = partial(
        tokenize_prompt, encoder=encoder, max_length=options.max_prompt_length, overlong=options.overlong
    )
    held_out = load_held_out(options.eval_data, options.prompt_data, options, Prompt, convert)
    if len(held_out) < 2:
        sources = " ".join(options.eval_data or options.prompt_data)
        raise UserError(f"{sources}: {len(held_out)} held-out prompts; a comparison needs at least 2")
    return held_out


def load_demonstrations(options: ComparePoliciesOptions, encoder: SegmentEncoder) -> list[MaskedText]:
    """Demonstrations of at most --max_length tokens, selected in the same way. Raises UserError for a bad
    record, and when none is left.
    """
    sources = options.eval_demonstration_data or options.demonstration_data
    if not sources:
        return []
    convert = partial(fit_demonstration, encoder=encoder, max_length=options.max_length, overlong="drop")
    all_stages = replace(options, data_split="")
    rows = load_held_out(
        options.eval_demonstration_data, options.demonstration_data, all_stages, MaskedText, convert
    )
    if not rows:
        raise UserError(f"{' '.join(sources)}: no held-out demonstrations left")
    return rows


def load_held_out(
    eval_files: Sequence[str], training_files: Sequence[str], options: ComparePoliciesOptions,
    row_class: type[Row], convert: Convert,
) -> list[Row]:  # fmt: skip
    """All rows of the evaluation files, or, without any, the held-out rows of the training files."""
    if not eval_files:
        return load_examples(training_files, replace(options, eval_data=[]), row_class, convert)[1]
    everything = replace(options, eval_data=[], eval_fraction=0.0, data_split="")
    rows, _ = load_examples(eval_files, everything, row_class, convert, is_training=False)
    rows = rows.take(slice(options.max_eval_samples or None))
    warn_of_few(rows.notes("held_out").tolist())
    return list(rows)


def compare_policies(
    policies: Sequence[Policy], scores: dict[str, list[np.ndarray]], count: int
) -> dict[str, Any]:
    """Metrics on the first `count` prompts, ready for JSON. scores: by judge, the proxy first.

    Each policy is compared with all policies before it, in the same order.
    """
    rollouts = [policy.rollouts[0].pick(range(count)) for policy in policies]
    lengths = [rollout.response_lengths.cpu().numpy() for rollout in rollouts]
    earlier: list[dict[str, np.ndarray]] = []  # scores of the policies before this one by judge, (count,)
    metrics = []
    for number, (policy, rollout) in enumerate(zip(policies, rollouts, strict=True)):
        ours = {name: by_policy[number][0, :count] for name, by_policy in scores.items()}
        for other, theirs in zip(rollouts, earlier, strict=False):
            # Identical responses are a tie, even if rounding in another batch has changed the score.
            alike = np.array([rollout.response(row) == other.response(row) for row in range(count)])
            ours = {name: np.where(alike, theirs[name], values) for name, values in ours.items()}
        against = [
            {
                name: statistics.wins(ours[name], theirs[name], lengths[number] - lengths[other])
                for name in ours
            }
            for other, theirs in enumerate(earlier)
        ]
        earlier.append(ours)
        metrics.append({
            "model": policy.path,
            "scores": {name: statistics.mean(values) for name, values in ours.items()},
            "kl": statistics.mean((policy.logprobs - policy.ref_logprobs)[:count].cpu().numpy()),
            **describe_responses(rollout),
            "perplexity": policy.perplexity,
            "against": against,
        })  # fmt: skip
    samples = {name: by_policy[0][:, :count].T for name, by_policy in scores.items()}  # (P, D)
    return {"prompts": count, "policies": metrics, "best_of": best_of_curve(samples)}


def best_of_curve(samples: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Best of 1, 2, 4, ... responses of one policy, selected by the first judge. samples: scores (P, D) by
    judge.
    """
    proxy = next(iter(samples.values()))
    return [
        {
            "n": n,
            "kl": statistics.best_of_kl(n),
            "scores": {
                name: statistics.mean(statistics.best_of(proxy, scores, n))
                for name, scores in samples.items()
            },
        }
        for n in (2**k for k in range(proxy.shape[1].bit_length()))
    ]


def write_report(figures: dict[str, Any], folder: Path) -> None:
    """Print the table; on rank 0, write report.json and the plot to the folder."""
    log(f"\n{table(figures)}")
    if rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", figures)
    with naming(folder / "scores.png"):
        plot_scores(figures).savefig(folder / "scores.png", dpi=150)
    log(f"\nreport.json and scores.png: {folder}")


if __name__ == "__main__":
    run_main(main)
