"""Costs of responses: what gives them, costs per token, and their metrics.

The costs of a rollout are a rollout too: the same responses, with costs for scores and the values of the
critic of costs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from common.model.families import check_scalar
from common.model.loading import load_config
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import load_encoders
from common.model.roles import check_scalar_model, policy_config
from common.runtime.distributed import log
from common.training.means import Mean
from step3_ppo.metrics import describe_values
from step3_ppo.models import ModelSources
from step3_ppo.reward_functions import load_functions
from step3_ppo.rewards import clip_scores, token_rewards
from step3_ppo.rollout import Rollout
from step3_ppo.safe.options import SafeOptions


def check_costs(options: SafeOptions, sources: ModelSources) -> tuple[SafeOptions, ModelSources]:
    """Options and sources in which the cost model and cost functions stand in the place of those of rewards.

    Raises UserError before any weights are loaded.
    """
    path = options.cost_model_name_or_path
    functions = load_functions(options.cost_function, "cost_function")
    if path:
        check_scalar_model(path, "cost_model_name_or_path")
        if not getattr(load_config(path), "is_cost_model", False):
            log(
                f"warning: --cost_model_name_or_path {path}: not trained with --objective cost; its scores"
                " must be higher for harmful responses, and --cost_limit fit them"
            )
    paths = [path] if path else []
    cost_options = replace(
        options, reward_model_name_or_path=paths, reward_combine="mean", reward_weights=[],
        reward_std_coef=EnsembleOptions.reward_std_coef, process_model_name_or_path="",
    )  # fmt: skip
    encoders = load_encoders(cost_options, sources.encoder, *sources.reward_encoders)
    cost_sources = replace(sources, functions=functions, reward_encoders=encoders, scores="cost")
    if not cost_sources.same_tokenizer:  # the critic starts from the actor's model
        check_scalar(policy_config(options.actor_model_name_or_path, "actor_model_name_or_path"))
    return cost_options, cost_sources


def token_costs(costs: Rollout, options: SafeOptions) -> Tensor:
    """Costs (B, R): the cost of a response at its last token, clipped by --score_clip.

    The KL penalty is part of the rewards alone, so that a run whose multiplier settles maximises what PPO
    with that number as a fixed penalty does. Dai et al. 2023 (appendix B) have half of it in each.
    """
    clipped = clip_scores(costs.scores, options.score_clip)
    return token_rewards(clipped, torch.zeros_like(costs.logprobs), costs.response_lengths, kl_coef=0.0)


def cost_metrics(costs: Rollout, returns: Tensor) -> dict[str, Mean]:
    """Metrics of the costs of a rollout. returns: (B, R), of its critic."""
    metrics = {
        "cost/mean": costs.scores.mean().item(),
        "cost/std": costs.scores.std(unbiased=False).item(),
        "cost/harmful_share": (costs.scores > 0).float().mean().item(),
        **describe_values(costs, returns, "cost_value"),
    }
    return {name: Mean(value) for name, value in metrics.items()}
