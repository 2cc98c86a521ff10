"""PPO and its relatives in plain PyTorch, given the responses that a run has sampled.

Schulman et al. 2016 (GAE) and 2017 (clipped surrogate), Ziegler et al. 2019 (KL in the reward, adaptive
coefficient, value clipping), Ye et al. 2020 (dual clip), Ouyang et al. 2022 (PPO-ptx), Ahmadian et al. 2024
(RLOO), Shao et al. 2024 (GRPO), Hu 2025 (REINFORCE++), Schulman 2020 (k1, k2, k3), Yu et al. 2025 (DAPO:
clip-higher, means over tokens, overlong penalty), Yue et al. 2025 (VAPO: two lambdas), Liu et al. 2025 (Dr.
GRPO: sums over a constant), Zheng et al. 2025 (GSPO-token), MiniMax 2025 (CISPO),
Yuan et al. 2025 (VC-PPO: the end of the warmup), He et al. 2025 (Skywork-OR1: entropy),
Liu et al. 2026 (GDPO: rewards standardised before their sum).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.recomputed.plain import Optimiser, adapted, all_logits, load, load_scorer, rate_factor, scores
from tests.recomputed.plain_sft import Text, mean_nll
from tests.recomputed.tiny import EOS, text_of


class Sampled(NamedTuple):
    """A prompt and its sampled response, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def ended(self) -> bool:
        return self.response[-1] == EOS

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.response]


class Iteration(NamedTuple):
    """What a run has sampled and how it has divided it."""

    rows: list[Sampled]
    minibatches: list[list[Sampled]]  # of all epochs
    measured: list[Sampled]  # read once more after the updates
    texts: list[list[Text]]  # demonstrations of each actor update; none without PPO-ptx
    computed: int  # positions computed to sample


class Scored(NamedTuple):
    """Numbers of a response; each tensor has one number per token of the response."""

    row: Sampled
    allowed: Tensor  # (T, V) tokens that could be drawn
    logprobs: Tensor
    reference: Tensor
    values: Tensor  # before each token
    value_after: float  # after the last token of a response that is cut, with bootstrapping
    by_model: float  # score
    by_function: float

    @property
    def kl(self) -> Tensor:
        return self.logprobs - self.reference


class Scorer(NamedTuple):
    """What scores responses: a reward model whose scores are centred, a function of texts, or both."""

    reward_model: str = ""
    centre: tuple[float, float] = (0.0, 1.0)  # mean and standard deviation
    function: Callable[[str], float] | None = None
    weight: float = 1.0  # of the function


class PPO:
    """A run: models, optimisers and what it remembers between iterations."""

    def __init__(self, policy: str, scorer: Scorer, options: Mapping[str, Any]) -> None:
        self.actor, self.reference, self.scorer = load(policy), load(policy), scorer
        if scorer.reward_model:
            self.reward_model, self.critic = (
                load_scorer(scorer.reward_model),
                load_scorer(scorer.reward_model),
            )
        else:
            self.critic = load_scorer(policy, num_labels=1)
            torch.nn.init.zeros_(self.critic.score.weight)
        if rank := options["lora_rank"]:
            alpha, seed = options["lora_alpha"], options["seed"]
            self.actor, self.critic = (adapted(m, rank, alpha, seed) for m in (self.actor, self.critic))
        self.options, self.kl_coef = options, options["kl_coef"]
        self.warmup = options.get("critic_warmup_steps", 0)
        self.entropy_coef = self.bonus = options["entropy_coef"]
        betas, eps = (0.9, 0.95), options["adam_epsilon"]
        self.of_actor = Optimiser(self.actor, betas, eps, options["weight_decay"])
        self.of_critic = Optimiser(self.critic, betas, eps, options["weight_decay"])
        self.of_iteration = (
            options["ppo_epochs"] * options["rollout_batch_size"] // options["global_batch_size"]
        )
        self.has_critic = options["advantage_estimator"] == "gae"
        self.all_scores: list[float] = []
        self.all_parts: list[tuple[float, float]] = []
        self.first_parts: Tensor | None = None  # of the first evaluation
        self.baseline: float | None = None
        self.average: dict[str, Tensor] = {}

    # Sampling and scoring

    def logits(self, model: LlamaForCausalLM, row: Sampled) -> Tensor:
        """(T, V) before each token of the response, at the temperature."""
        before = all_logits(model, row.ids)[len(row.prompt) - 1 : -1]
        return before / self.options["temperature"]

    def allowed(self, row: Sampled) -> Tensor:
        """The tokens that top-k and top-p leave, by the probabilities of the actor."""
        probabilities = torch.softmax(self.logits(self.actor, row), dim=-1)
        result = torch.zeros_like(probabilities, dtype=torch.bool)
        for t, position in enumerate(probabilities):
            likeliest = sorted(range(len(position)), key=lambda token: -position[token].item())
            likeliest = likeliest[: self.options.get("top_k", 0) or None]
            enough, total = self.options.get("top_p", 1.0) * sum(position[likeliest].tolist()), 0.0
            for token in likeliest:
                if total < enough:
                    result[t, token] = True
                total += position[token].item()
        assert all(result[t, token] for t, token in enumerate(row.response))
        return result

    def distribution(self, model: LlamaForCausalLM, row: Sampled, allowed: Tensor) -> Tensor:
        """Log-probabilities (T, V) of the tokens that could be drawn."""
        return torch.log_softmax(self.logits(model, row).masked_fill(~allowed, -torch.inf), dim=-1)

    def logprobs(self, model: LlamaForCausalLM, row: Sampled, allowed: Tensor) -> Tensor:
        return self.distribution(model, row, allowed)[range(len(row.response)), list(row.response)]

    def values(self, row: Sampled) -> Tensor:
        """(T + 1,) before each token of the response and after the last one."""
        return scores(self.critic, row.ids, *self.scorer.centre)[len(row.prompt) - 1 :]

    @torch.no_grad()
    def read(self, row: Sampled) -> Scored:
        """The score is read at EOS, which a response that was cut gets too."""
        allowed, values = self.allowed(row), self.values(row)
        logprobs = [self.logprobs(model, row, allowed) for model in (self.actor, self.reference)]
        after = values[-1].item() if self.options.get("bootstrap_truncated") and not row.ended else 0.0
        return Scored(row, allowed, *logprobs, values[:-1], after, *self.parts(row))

    def parts(self, row: Sampled) -> tuple[float, float]:
        """The scores by reward model and function, each 0 without one."""
        by_model = by_function = 0.0
        if self.scorer.reward_model:
            closed = row.ids if row.ended else [*row.ids, EOS]
            by_model = scores(self.reward_model, closed, *self.scorer.centre)[-1].item()
        if self.scorer.function:
            by_function = self.scorer.function(text_of(row.response))
        return by_model, by_function

    def score(self, one: Scored) -> float:
        """For metrics: of normalised parts, by the mean and deviation of the first evaluation."""
        by_model, by_function = one.by_model, one.by_function
        if self.options.get("normalise_scores") == "each":
            by_model, by_function = standardise((by_model, by_function), self.first_parts)
        return by_model + self.scorer.weight * by_function

    # Rewards and advantages

    def rewards(self, rollout: Sequence[Scored]) -> tuple[list[Tensor], dict[str, float]]:
        """Per token: the KL penalty, and at the last one the score less its penalties."""
        options, rewards, clipped, penalties = self.options, [], 0, []
        normalised = [self.score(one) for one in rollout]
        match options.get("normalise_scores"):
            case "sum":
                self.all_scores += normalised
                seen = torch.tensor(self.all_scores).double()
                normalised = [(x - seen.mean().item()) / seen.std(correction=0).item() for x in normalised]
            case "each":
                parts = [(one.by_model, one.by_function) for one in rollout]
                self.all_parts += parts
                apart = [standardise(part, torch.tensor(self.all_parts)) for part in parts]
                normalised = [by_model + self.scorer.weight * other for by_model, other in apart]
        for one, score in zip(rollout, normalised, strict=True):
            limit = options["score_clip"] or torch.inf
            clipped += abs(score) > limit
            penalties.append(
                options["missing_eos_penalty"] * (not one.row.ended)
                + options["length_penalty"] * len(one.row.response)
                + options["repetition_penalty"] * repeated(one.row.response, 3)
            )
            if buffer := options.get("overlong_buffer"):
                free = options["max_response_length"] - buffer
                used = len([token for token in range(len(one.row.response)) if token >= free])
                penalties[-1] += options["overlong_penalty"] * used / buffer
            in_reward = self.kl_coef if options["kl_penalty"] == "reward" else 0.0
            rewards.append(-in_reward * one.kl)
            rewards[-1][-1] += max(-limit, min(limit, score)) - penalties[-1]
        figures = {
            "reward/clipped": clipped / len(rollout), "reward/penalty": mean(penalties),
            "reward/total": mean([part.sum().item() for part in rewards]),
        }  # fmt: skip
        if options.get("whiten_rewards"):
            every = torch.cat(rewards)
            rewards = [(part - every.mean()) / every.std() + every.mean() for part in rewards]
        return rewards, figures

    def advantages(
        self, rollout: Sequence[Scored], rewards: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per token, and the returns that the critic learns."""
        options, gamma = self.options, self.options["gamma"]
        ones = [torch.ones(len(part)) for part in rewards]
        totals = [part.sum().item() for part in rewards]
        to_go = [discounted(part, gamma) for part in rewards]
        prompts = [one.row.prompt for one in rollout]
        groups = [
            [total for other, total in zip(prompts, totals, strict=True) if other == prompt]
            for prompt in prompts
        ]
        match options["advantage_estimator"]:
            case "gae":
                pairs = [*zip(rollout, rewards, strict=True)]
                advantages = [self.gae(one, part, self.actor_lambda(one)) for one, part in pairs]
                of_critic = options.get("critic_gae_lambda", options["gae_lambda"])
                returns = [self.gae(one, part, of_critic) + one.values for one, part in pairs]
                return (whiten(advantages) if options["whiten_advantages"] else advantages), returns
            case "reinforce_pp":
                return whiten(to_go), []
            case "reinforce":
                now = mean([part[0].item() for part in to_go])
                baseline = now
                if options.get("reinforce_baseline") == "moving":
                    baseline = now if self.baseline is None else self.baseline
                    self.baseline = 0.9 * baseline + 0.1 * now
                return [part - baseline for part in to_go], []
            case "rloo":
                others = [
                    (sum(group) - x) / (len(group) - 1) for group, x in zip(groups, totals, strict=True)
                ]
                return [one * (x - o) for one, x, o in zip(ones, totals, others, strict=True)], []
            case "group":
                scaled = []
                for group, total in zip(groups, totals, strict=True):
                    deviation = torch.tensor(group).std().item() + 1e-4 if options["group_std"] else 1.0
                    scaled.append((total - mean(group)) / deviation)
                return [one * x for one, x in zip(ones, scaled, strict=True)], []
        raise ValueError(options["advantage_estimator"])

    def actor_lambda(self, one: Scored) -> float:
        """VAPO: the horizon 1 / (1 - lambda) is a share of the length."""
        if alpha := self.options.get("length_adaptive_lambda"):
            horizon = max(alpha * len(one.row.response), 1.0)
            return (horizon - 1) / horizon
        return self.options["gae_lambda"]

    def gae(self, one: Scored, rewards: Tensor, decay: float) -> Tensor:
        """A_t = sum_l (gamma lambda)^l delta_{t+l}."""
        gamma = self.options["gamma"]
        following = [*one.values[1:].tolist(), one.value_after]
        deltas = [r + gamma * after - v for r, v, after in zip(rewards, one.values, following, strict=True)]
        return discounted(deltas, gamma * decay)

    # Updates

    def iterate(self, step: int, sampled: Iteration) -> dict[str, float]:
        """One iteration; returns its metrics."""
        options, rows = self.options, sampled.rows
        rollout = [self.read(row) for row in rows]
        rewards, figures = self.rewards(rollout)
        advantages, returns = self.advantages(rollout, rewards)
        learns = step > self.warmup
        line = self.describe(rollout, returns, sampled.computed) | figures
        line |= {"step": step, "train/lr": self.rate("actor", step, 0), "kl/coef": self.kl_coef}
        if options.get("samples_per_prompt", 1) > 1:
            scores = [
                {(o.by_model, o.by_function) for o in rollout if o.row.prompt == one.row.prompt}
                for one in rollout
            ]
            share = mean([float(len(of_prompt) == 1) for of_prompt in scores])
            line |= {"rollout/equal_groups": share, "rollout/equal_groups_left": share}
            line["rollout/redrawn_groups"] = 0.0
        number_of = {row: number for number, row in enumerate(rows)}  # equal rows have equal numbers
        policy, value, texts = [], [], []  # of all updates
        norms: dict[str, list[float]] = {"policy": [], "value": []}
        line["policy/update_kl"] = 0.0
        for update, batch in enumerate(sampled.minibatches):
            numbers = [number_of[row] for row in batch]
            part = [rollout[number] for number in numbers]
            if learns:
                loss, per_token = self.policy_loss(part, [advantages[number] for number in numbers])
                if sampled.texts:
                    ptx = mean_nll(self.actor, sampled.texts[update])
                    texts.append(ptx.item())
                    loss = loss + options["ptx_coef"] * ptx
                rate = self.rate("actor", step, update)
                norms["policy"].append(self.of_actor.step(loss, rate, options["max_grad_norm"]))
                policy.append(per_token)
            if self.has_critic:
                loss, per_token = self.value_loss(part, [returns[number] for number in numbers])
                rate = self.rate("critic", step, update)
                norms["value"].append(self.of_critic.step(loss, rate, options["max_grad_norm"]))
                value.append(per_token)
            if learns:
                before = policy[-1][:, 3].sum().item() / len(part)  # KL of the earlier updates
                is_last = before > options["max_update_kl"] or update + 1 == self.of_iteration
                if is_last:
                    line["policy/update_kl"] = self.moved(
                        [rollout[number_of[row]] for row in sampled.measured]
                    )
                assert is_last == (update + 1 == len(sampled.minibatches)), "--max_update_kl ends epochs"
        if policy:
            # The sampler is the trainer, in fp32.
            line |= {
                "rollout/gap_mean": 0.0,
                "rollout/gap_max": 0.0,
                "rollout/gap_kl": 0.0,
                "rollout/ess": 1.0,
            }
            line["policy/ratio"] = policy[0][:, 1].mean().item()
            loss, _, clipped, k2, entropy = torch.cat(policy).mean(0).tolist()
            line |= {"policy/loss": loss, "policy/clip_fraction": clipped}
            line |= {"policy/approx_kl": k2, "policy/entropy": entropy}
        if value:
            line["value/loss"], line["value/clip_fraction"] = torch.cat(value).mean(0).tolist()
        line |= {f"{name}/grad_norm": mean(every) for name, every in norms.items() if every}
        if texts:
            line["ptx/loss"] = mean(texts)
        line |= {"policy/updates": len(sampled.minibatches), "train/skipped_updates": 0}
        if options.get("kl_controller") == "adaptive":
            error = max(-0.2, min(0.2, line["kl/mean"] / options["kl_target"] - 1))
            self.kl_coef *= 1 + error * len(rows) / options["kl_horizon"]
        if high := options.get("entropy_high"):
            line["policy/entropy_coef"] = self.bonus
            is_low, is_high = line["policy/entropy"] < options["entropy_low"], line["policy/entropy"] > high
            self.entropy_coef = max(self.entropy_coef + options["entropy_coef_step"] * (is_low - is_high), 0)
            self.bonus = 0.0 if is_high else self.entropy_coef
        if not learns and line["value/explained_var"] >= options.get("critic_warmup_until", torch.inf):
            self.warmup = step
        if decay := options.get("ema_decay"):
            for name, weight in self.actor.state_dict().items():
                before = self.average.get(name, weight)
                self.average[name] = decay * before + (1 - decay) * weight.clone()
        return line

    def rate(self, model: str, step: int, update: int) -> float:
        """Learning rate; the schedule counts all updates of earlier iterations, whether made or not."""
        waits = model == "actor" and "critic_warmup_until" not in self.options
        warmup = self.options.get("critic_warmup_steps", 0) if waits else 0
        iterations, before = self.options["max_steps"] - warmup, max(step - 1 - warmup, 0)
        done = before * self.of_iteration + update
        factor = rate_factor(self.options["lr_scheduler_type"], done, iterations * self.of_iteration)
        return self.options[f"{model}_learning_rate"] * factor

    def policy_loss(self, batch: Sequence[Scored], advantages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over tokens; and per token loss, ratio, whether it is clipped, k2 and entropy."""
        options, per_token, losses, surrogates = self.options, [], [], []
        for one, advantage in zip(batch, advantages, strict=True):
            every = self.distribution(self.actor, one.row, one.allowed)
            logprobs = every[range(len(one.row.response)), list(one.row.response)]
            entropy = -(every.exp() * every.masked_fill(~one.allowed, 0.0)).sum(1)
            ratio = torch.exp(logprobs - one.logprobs)
            if options.get("policy_loss") == "gspo":
                of_row = ratio.detach().prod() ** (1 / len(ratio))
                ratio = of_row * torch.exp(logprobs) / torch.exp(logprobs).detach()
            low, high = options["clip_range"], options.get("clip_range_high", options["clip_range"])
            plain, bounded = ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage
            surrogate = torch.minimum(plain, bounded)
            if bound := options["dual_clip"]:
                is_negative = advantage < 0
                surrogate = torch.where(is_negative, torch.maximum(surrogate, bound * advantage), surrogate)
            is_clipped = bounded < plain
            if options.get("policy_loss") == "cispo":
                is_clipped = (ratio < 1 - low) | (ratio > 1 + high)
                surrogate = ratio.detach().clip(1 - low, 1 + high) * advantage * logprobs
            loss, x = -surrogate, logprobs - one.reference
            match options["kl_penalty"]:
                case "k2":
                    loss = loss + self.kl_coef * x**2 / 2
                case "k3":
                    loss = loss + self.kl_coef * (torch.exp(-x) - 1 + x)
            losses.append(loss - self.bonus * entropy)
            surrogates.append(-surrogate)
            k2 = (logprobs - one.logprobs) ** 2 / 2
            per_token.append(torch.stack([0 * ratio, ratio, is_clipped.float(), k2, entropy], dim=1))
        every = torch.cat(per_token).detach()
        every[:, 0] = self.over_responses(batch, surrogates).item()
        return self.over_responses(batch, losses), every

    def over_responses(self, batch: Sequence[Scored], losses: Sequence[Tensor]) -> Tensor:
        """The loss of responses from those of their tokens; 0 where all are left out."""
        counted = self.counted(batch, losses)
        match self.options.get("loss_aggregation", "token") if counted else "none":
            case "none":
                return sum(part.sum() for part in losses) * 0.0
            case "token":
                return torch.cat(counted).mean()
            case "sequence":
                return torch.stack([part.mean() for part in counted]).mean()
            case "constant":
                longest = self.options["max_response_length"]
                return torch.stack([part.sum() / longest for part in counted]).mean()
        raise ValueError(self.options["loss_aggregation"])

    def counted(self, batch: Sequence[Scored], parts: Sequence[Tensor]) -> list[Tensor]:
        """Those of the responses that are learnt from."""
        is_masked = self.options.get("mask_truncated", False)
        return [part for one, part in zip(batch, parts, strict=True) if one.row.ended or not is_masked]

    def value_loss(self, batch: Sequence[Scored], returns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over tokens; and per token loss and whether it is clipped."""
        most, per_token = self.options["value_clip_range"], []
        for one, target in zip(batch, returns, strict=True):
            values = self.values(one.row)[:-1]
            near = torch.maximum(torch.minimum(values, one.values + most), one.values - most)
            error, near_error = (values - target) ** 2, (near - target) ** 2
            loss = torch.maximum(error, near_error) / 2
            per_token.append(torch.stack([loss, (near_error > error).float()], dim=1))
        every, counted = torch.cat(per_token), self.counted(batch, [part[:, 0] for part in per_token])
        loss = torch.cat(counted).mean() if counted else every.sum() * 0.0
        every = every.detach()
        every[:, 0] = loss.item()
        return loss, every

    @torch.no_grad()
    def moved(self, batch: Sequence[Scored]) -> float:
        """KL from the rollout's policy in nats per response (k2)."""
        squares = [
            ((self.logprobs(self.actor, one.row, one.allowed) - one.logprobs) ** 2).sum().item() / 2
            for one in batch
        ]
        return mean(squares)

    # Metrics

    def describe(
        self, rollout: Sequence[Scored], returns: Sequence[Tensor], computed: int
    ) -> dict[str, float]:
        """Metrics of a rollout."""
        every, number = torch.tensor([self.score(one) for one in rollout]), len(rollout)
        read_once = {tuple(one.row.prompt) for one in rollout}
        useful = sum(map(len, read_once)) + sum(len(one.row.response) for one in rollout) - number
        quantiles = torch.quantile(every, torch.tensor([0.1, 0.5, 0.9])).tolist()
        line = {
            "reward/mean": every.mean().item(), "reward/std": every.std(correction=0).item(),
            **dict(zip(("reward/p10", "reward/median", "reward/p90"), quantiles, strict=True)),
            "kl/mean": mean([one.kl.sum().item() for one in rollout]),
            "policy/perplexity": torch.cat([one.logprobs for one in rollout]).mean().neg().exp().item(),
            "rollout/useful_share": useful / computed,
        }  # fmt: skip
        if self.scorer.reward_model and self.scorer.function:
            line["reward/mean_1"] = mean([one.by_model for one in rollout])
            line["reward/mean_early"] = mean([one.by_function for one in rollout])
            parts = torch.tensor([(one.by_model, one.by_function) for one in rollout])
            line["reward/std_1"], line["reward/std_early"] = parts.std(0, correction=0).tolist()
        for quarter in range(4):
            part = [
                kl
                for one in rollout
                for t, kl in enumerate(one.kl.tolist())
                if t * 4 // len(one.kl) == quarter
            ]
            line[f"kl/quarter_{quarter + 1}"] = mean(part) if part else 0.0
        if returns:
            values, targets = torch.cat([one.values for one in rollout]), torch.cat([*returns])
            line["value/explained_var"] = (1 - (targets - values).var() / targets.var()).item()
            line["value/mean"] = values.mean().item()
        return line | {f"response/{name}": x for name, x in describe([one.row for one in rollout]).items()}

    def evaluate(self, step: int, rows: Sequence[Sampled]) -> dict[str, float]:
        rollout = [self.read(row) for row in rows]
        parts = torch.tensor([(one.by_model, one.by_function) for one in rollout])
        self.first_parts = parts if self.first_parts is None else self.first_parts
        every = torch.tensor([self.score(one) for one in rollout])
        of_parts = dict(zip(("eval/score_1", "eval/score_early"), parts.mean(0).tolist(), strict=True))
        return {
            **(of_parts if self.scorer.reward_model and self.scorer.function else {}),
            "step": step, "eval/score": every.mean().item(), "eval/score_std": every.std(correction=0).item(),
            "eval/kl": mean([one.kl.sum().item() for one in rollout]),
            **{f"eval/{name}": x for name, x in describe(rows).items()},
        }  # fmt: skip


def describe(rows: Sequence[Sampled]) -> dict[str, float]:
    return {
        "length": mean([len(row.response) for row in rows]),
        "eos_rate": mean([row.ended for row in rows]),
        "distinct_1": mean([1 - repeated(row.response, 1) for row in rows]),
        "distinct_2": mean([1 - repeated(row.response, 2) for row in rows]),
        "repeated_3": mean([repeated(row.response, 3) for row in rows]),
    }


def repeated(response: Sequence[int], size: int) -> float:
    """Share of n-grams that occurred before in the response."""
    ngrams = [tuple(response[start : start + size]) for start in range(len(response) - size + 1)]
    return (
        sum(ngram in ngrams[:number] for number, ngram in enumerate(ngrams)) / len(ngrams) if ngrams else 0.0
    )


def standardise(part: tuple[float, float], seen: Tensor) -> tuple[float, float]:
    """Scores by reward model and function in deviations from the means of others (N, 2)."""
    means, deviations = seen.double().mean(0).tolist(), seen.double().std(0, correction=0).tolist()
    return tuple((x - m) / d for x, m, d in zip(part, means, deviations, strict=True))


def discounted(numbers: Sequence[Tensor], decay: float) -> Tensor:
    """sum_l decay^l x_{t+l} at each t."""
    count = range(len(numbers))
    return torch.stack([sum(decay ** (s - t) * numbers[s] for s in count[t:]) for t in count])


def whiten(parts: Sequence[Tensor]) -> list[Tensor]:
    """Mean 0 and variance 1 over all tokens."""
    every = torch.cat([*parts])
    return [(part - every.mean()) / every.std() for part in parts]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
