"""Evaluation of a reward model, or of an ensemble, on held-out preferences.


bash launch/evaluate_reward.sh --reward_model_name_or_path OUT2/final --eval_data F.jsonl --output_dir DIR
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from common.data.batching import micro_batch
from common.model.forward import base_model
from common.model.loading import fit_to_model, load_config
from common.model.reward_ensemble import combine, load_encoders, load_members
from common.model.zero import load_inference_config
from common.runtime.distributed import init_distributed, log
from common.runtime.files import make_folder
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import UNWRITTEN, report_accepted, run_main, stop_anywhere, stop_between_steps
from step2_reward.data import Layout
from step2_reward.evaluation.report import collect_pairs, load_pairs, write_report
from step2_reward.evaluation.scores import score_pairs, sign_accuracy
from step2_reward.options import EvaluateRewardOptions, Objective


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(EvaluateRewardOptions)
    zero = load_inference_config(options)
    encoders = load_encoders(options)
    configs = [load_config(path) for path in options.reward_model_name_or_path]
    options, objective = fit_to_model(options, *configs), objective_of(configs, options)
    data = load_pairs(
        options.eval_data, encoders, options, options.max_length, options.max_eval_samples, objective
    )
    output = make_folder("output_dir", options.output_dir)
    init_distributed()
    report_accepted()
    stop_anywhere(UNWRITTEN)

    # 2. Score the pairs with one model after the other.
    sides = []
    for member in load_members(options, encoders, zero):
        rows, layout = data.rows[member.encoder], Layout(member.encoder.pad_token_id)
        with member.ready() as model:
            sides.append(torch.stack(score_pairs(model, rows, micro_batch(options), layout)))  # (2, P)
            reward_std = getattr(base_model(model).config, "reward_std", 1.0)
    members = torch.stack(sides)  # (M, 2, P)
    better, worse = (combine(members[:, side], options) for side in (0, 1))  # (P,) each

    # 3. Write the report. Probabilities need raw scores, which an ensemble does not have.
    history = Path(options.reward_model_name_or_path[0]).parent / "metrics.jsonl"
    is_single = len(members) == 1
    judged = collect_pairs(data, rows, better, worse)
    if objective == "cost":
        share = sign_accuracy(rows, better, worse)
        log(f"costs: chosen is the more harmful response; {share:.1%} of all are on the right side of 0")
    stop_between_steps()
    write_report(judged, reward_std if is_single else None, history if is_single else None, output)


def objective_of(configs: Sequence[PretrainedConfig], options: EvaluateRewardOptions) -> Objective:
    """What the models were trained for. Raises UserError for an ensemble of reward and cost models."""
    are_costs = {getattr(config, "is_cost_model", False) for config in configs}
    if len(are_costs) > 1:
        paths = " ".join(options.reward_model_name_or_path)
        raise UserError(
            f"--reward_model_name_or_path {paths}: allowed: reward models or cost models, not both"
        )
    return "cost" if are_costs == {True} else "reward"


if __name__ == "__main__":
    run_main(main)
