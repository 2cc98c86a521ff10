"""PPO with a limit on costs in plain PyTorch.

Dai et al. 2023 (Safe RLHF): a critic of costs, advantages (A_r - lambda A_c) / (1 + lambda), and ln lambda +=
rate * lambda * (mean cost - limit) after each iteration. The KL penalty is in the rewards.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.recomputed.plain_ppo import PPO, Iteration, Sampled, Scored, Scorer, mean, whiten


class SafePPO(PPO):
    """A run whose costs are another PPO without a policy of its own: its scores are costs."""

    def __init__(self, policy: str, scorer: Scorer, cost_scorer: Scorer, options: Mapping[str, Any]) -> None:
        super().__init__(policy, scorer, options)
        self.costs = PPO(policy, cost_scorer, options)
        self.costs.actor, self.costs.reference = self.actor, self.reference
        self.multiplier = options["lambda_init"]

    def advantages(
        self, rollout: Sequence[Scored], rewards: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        options, limit = self.options, self.options["score_clip"]
        of_rewards = [
            self.gae(one, part, options["gae_lambda"]) for one, part in zip(rollout, rewards, strict=True)
        ]
        returns = [part + one.values for part, one in zip(of_rewards, rollout, strict=True)]
        self.read_costs = [self.costs.read(one.row) for one in rollout]
        of_costs = []
        for one in self.read_costs:
            by_token = torch.zeros(len(one.row.response))
            by_token[-1] = max(-limit, min(limit, self.costs.score(one)))
            of_costs.append(self.gae(one, by_token, options["gae_lambda"]))
        self.cost_returns = [part + one.values for part, one in zip(of_costs, self.read_costs, strict=True)]
        share = 1 / (1 + self.multiplier)
        combined = [share * r - (1 - share) * c for r, c in zip(of_rewards, of_costs, strict=True)]
        return whiten(combined) if options["whiten_advantages"] else combined, returns

    def iterate(self, step: int, sampled: Iteration) -> dict[str, float]:
        line, options = super().iterate(step, sampled), self.options
        costs, per_token, norms = torch.tensor([self.costs.score(one) for one in self.read_costs]), [], []
        number_of = {row: number for number, row in enumerate(sampled.rows)}
        for update, batch in enumerate(sampled.minibatches):
            numbers = [number_of[row] for row in batch]
            part = [self.read_costs[number] for number in numbers]
            loss, each = self.costs.value_loss(part, [self.cost_returns[number] for number in numbers])
            rate = self.rate("critic", step, update)
            norms.append(self.costs.of_critic.step(loss, rate, options["max_grad_norm"]))
            per_token.append(each)
        values, targets = torch.cat([one.values for one in self.read_costs]), torch.cat(self.cost_returns)
        loss, clipped = torch.cat(per_token).mean(0).tolist()
        line |= {
            "cost/mean": costs.mean().item(), "cost/std": costs.std(correction=0).item(),
            "cost/harmful_share": mean([float(cost > 0) for cost in costs.tolist()]),
            "cost/lambda": self.multiplier, "cost/limit": options["cost_limit"],
            "cost_value/loss": loss, "cost_value/clip_fraction": clipped,
            "cost_value/grad_norm": mean(norms), "cost_value/mean": values.mean().item(),
            "cost_value/explained_var": (1 - (targets - values).var() / targets.var()).item(),
        }  # fmt: skip
        if step > self.warmup:
            excess = costs.mean().item() - options["cost_limit"]
            raised = self.multiplier * math.exp(options["lambda_rate"] * self.multiplier * excess)
            self.multiplier = max(options["lambda_min"], min(options["lambda_max"], raised))
        return line

    def evaluate(self, step: int, rows: Sequence[Sampled]) -> dict[str, float]:
        costs = [self.costs.score(self.costs.read(row)) for row in rows]
        return super().evaluate(step, rows) | {"eval/cost": mean(costs)}
