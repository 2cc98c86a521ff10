"""The rules of the report, and their application to the metrics of a run. Pure.

Rules about a change compare the means over the first and the last fifth of a curve; rules about a level use
the last fifth. Thresholds are rules of thumb: a finding is a reason to look, not a proof.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.report import checks, checks_ppo, hacks
from launch.report.read import Line, columns
from launch.report.rule import Finding, Rule, when
from launch.report.trends import FEWEST, Curve, large_change
from step3_ppo.kl_advice import IDLE

LEAST_STEPS = 10  # of a run, with FEWEST logged ones, to judge its trends
GOLD = "no gold score: --gold_reward_model or --gold_function"
ONLY_AT_0 = "the only evaluation is at step 0, before training: a lower --eval_steps"
NO_EVALUATIONS = "no evaluations: --eval_data or --eval_fraction, and --eval_steps"
TRAINED = "sft reward direct process"
EVERY = f"{TRAINED} ppo"
PAIRS = "reward direct"
COIN_TOSS = math.log(2)  # preference loss of a random model, nats per pair
COIN_TOSS_PROBLEM = (
    "No better than a coin toss: the loss on {} pairs is {{end:.4g}} at the end, and that of a model that"
    f" prefers neither is ln 2 = {COIN_TOSS:.4g}."
)
COIN_TOSS_ADVICE = (
    "with a high accuracy, the model is too sure: a lower --learning_rate, --label_smoothing; else a higher"
    " --learning_rate, more steps, better labels."
)


def _is_coin_toss(losses: Curve, use_margin: bool = False, loss: str = "dpo") -> bool:
    return not use_margin and loss in ("dpo", "robust") and losses.end >= COIN_TOSS


RULES = [
    Rule("skipped updates", EVERY, "step train/skipped_updates",
         when(lambda step, skipped: skipped.last > 0.005 * max(step.last, 1),
              "Skipped updates: {1.last:.0f} in {last:.0f} steps, because of non-finite gradients.",
              "a lower learning rate; bf16 instead of fp16, which skips some while it adjusts the loss"
              " scale.")),
    *[
        Rule(f"size of {name}", stages, name,
             when(lambda norm: norm.end > 10 and (norm.end > 100 or norm.end > 10 * norm.start),
                  f"Large gradients: {name} went from {{start:.3g}} to {{end:.3g}}, far above the clipping"
                  " norm.",
                  "a lower learning rate; a longer --warmup_ratio; the records of the steps where the norm"
                  " jumps."), optional=True)
        for name, stages in (
            ("train/grad_norm", TRAINED), ("policy/grad_norm", "ppo"), ("value/grad_norm", "ppo"),
        )
    ],
    Rule("learning rate", EVERY, "train/lr",
         when(lambda rate: not any(rate.values), "The learning rate is 0 in all logged steps.",
              "a shorter --warmup_ratio; more steps."), fewest=2),
    Rule("trend of train/loss", TRAINED, "train/loss, eval/loss", checks.rising_loss, FEWEST),
    Rule("level of the loss", "sft", "train/loss", checks.high_loss),
    Rule("overfitting", TRAINED, "step eval/loss, step train/loss", checks.overfitting, 2),
    Rule("held-out loss against a coin toss", PAIRS, "eval/loss",
         when(_is_coin_toss, COIN_TOSS_PROBLEM.format("held-out"), COIN_TOSS_ADVICE),
         options=("use_margin", "loss")),
    Rule("training loss against a coin toss", PAIRS, "train/loss, eval/loss",
         when(lambda trained, held_out, centre_coef=0, lm_loss_coef=0, **options:
              not held_out.values and not centre_coef and not lm_loss_coef
              and _is_coin_toss(trained, **options),
              COIN_TOSS_PROBLEM.format("training"), COIN_TOSS_ADVICE), FEWEST,
         options=("use_margin", "loss", "centre_coef", "lm_loss_coef")),
    Rule("held-out accuracy", PAIRS, "eval/accuracy",
         when(lambda accuracy: accuracy.end < 0.5,
              "Accuracy below chance: {end:.1%} of the held-out pairs are ranked as labelled.",
              "check whether labels are swapped; a higher --learning_rate; more steps; better labels.")),
    Rule("held-out accuracy", PAIRS, "eval/accuracy",
         when(lambda accuracy: 0.5 <= accuracy.end <= 0.55,
              "Accuracy near chance: {end:.1%} of the held-out pairs are ranked as labelled.",
              "a higher --learning_rate; more steps; better labels."), optional=True),
    Rule("gap of accuracies", PAIRS, "eval/accuracy, train/accuracy",
         when(lambda held_out, trained: trained.end >= 0.95 and trained.end - held_out.end >= 0.15,
              "Overfitting: accuracy is {1.end:.1%} in training and {end:.1%} on held-out pairs.",
              "fewer --num_train_epochs; a lower --learning_rate; --best_metric eval/accuracy; more data.")),
    Rule("spread of scores", "reward", "eval/chosen_std",
         when(lambda spread: spread.end < 0.01,
              "Collapsed scores: scores of held-out chosen responses have a standard deviation of {end:.2g}.",
              "a higher --learning_rate; a lower --centre_coef."), optional=True),
    Rule("NLL of chosen responses", "direct", "eval/nll_chosen",
         when(lambda nll: nll.end > nll.values[0] + 0.01 * abs(nll.values[0]),
              "Chosen responses become less likely: eval/nll_chosen rose from {values[0]:.3g} to {end:.3g}"
              " nats per token.",
              "a higher --beta; a lower --learning_rate; --loss cpo; an earlier checkpoint."), fewest=2),
    Rule("margin", PAIRS, "eval/margin",
         when(lambda margin: margin.end < 0,
              "Negative margin: eval/margin is {end:.3g} at the end; rejected responses have the higher"
              " reward.",
              "check whether labels are swapped; a higher --learning_rate; more steps."), optional=True),
    Rule("distance on the data", "direct", "logratio/mean",
         when(lambda log_ratio: abs(log_ratio.end) > 50,
              "Far from the reference: logratio/mean is {end:.3g} nats per response at the end.",
              "a higher --beta; a lower --learning_rate; fewer --num_train_epochs."), optional=True),
    Rule("over-optimisation", "ppo", "step eval/score eval/gold", hacks.over_optimisation, FEWEST,
         needs=GOLD),
    Rule("fall of gold", "ppo", "step eval/score eval/gold", hacks.falling_gold, 2, optional=True),
    Rule("fall of the held-out score", "ppo", "step eval/score, eval/score_std", checks_ppo.falling_score, 2),
    Rule("gain for the KL", "ppo", "eval/kl eval/score, eval/score_std",
         when(lambda kl, score, spread: kl.end >= 1 and abs(score.end - score.start) <= score.noise
              and score.end - score.start
              <= large_change(max(score.start, score.end, key=abs), spread.values),
              "KL without gain: eval/kl is {end:.3g} nats at the end, but eval/score went from"
              " {1.start:.3g} to {1.end:.3g}.",
              "a lower --actor_learning_rate; larger rollouts; check the reward model with"
              " launch/evaluate_reward.sh."), FEWEST),
    Rule("fall of reward/mean", "ppo", "reward/mean",
         when(lambda reward: reward.start - reward.end > reward.noise,
              "Falling score: reward/mean went from {start:.3g} to {end:.3g}.",
              "a lower --actor_learning_rate; a higher --kl_coef; fewer --ppo_epochs; smaller penalties."),
         FEWEST),
    Rule("length hack", "ppo", "reward/mean response/length", hacks.length_hack, FEWEST),
    Rule("repetition", "ppo", "response/repeated_3, response/distinct_2, reward/mean", hacks.repetition),
    Rule("entropy", "ppo", "policy/entropy",
         when(lambda entropy: entropy.end > 2 * entropy.start and entropy.end > entropy.start + 1,
              "Rising entropy: policy/entropy went from {start:.3g} to {end:.3g} nats per token.",
              "a lower --entropy_coef; a higher --kl_coef; a lower --actor_learning_rate.")),
    Rule("entropy", "ppo", "policy/entropy",
         when(lambda entropy: entropy.end < 0.1 * entropy.start or entropy.end < 0.05,
              "Collapsed entropy: policy/entropy went from {start:.3g} to {end:.3g} nats per token.",
              "--entropy_coef; a higher --kl_coef; a lower --actor_learning_rate."), optional=True),
    Rule("diversity", "ppo", "eval/distinct_2",
         when(lambda distinct: distinct.end < 0.5 * distinct.start or distinct.end < 0.3,
              "Collapsed diversity: eval/distinct_2 went from {start:.1%} to {end:.1%}.",
              "look at the samples; a higher --kl_coef; a lower --actor_learning_rate; an earlier"
              " checkpoint.")),
    Rule("truncated responses", "ppo", "response/eos_rate", checks_ppo.truncation,
         options=("missing_eos_penalty",)),
    Rule("length at the limit", "ppo", "response/length, response/eos_rate",
         when(lambda length, rate, max_response_length=0, missing_eos_penalty=None:
              missing_eos_penalty != 0 and not rate.end < 0.75
              and length.end >= 0.95 * max_response_length > 0,
              "Length at the limit: response/length is {end:.0f} tokens at the end, of --max_response_length"
              " {max_response_length}.",
              "a longer --max_response_length; --length_penalty; a higher --missing_eos_penalty."),
         options=("max_response_length", "missing_eos_penalty")),
    Rule("shrinking responses", "ppo", "response/length",
         when(lambda length: length.end < 0.3 * length.start,
              "Responses shrink: response/length went from {start:.0f} to {end:.0f} tokens.",
              "look at the samples; a lower --length_penalty or --missing_eos_penalty; a higher --kl_coef."),
         FEWEST),
    Rule("penalties", "ppo", "reward/penalty reward/std", checks_ppo.large_penalties,
         options=("normalise_scores",)),
    Rule("clipped scores", "ppo", "reward/clipped",
         when(lambda clipped: clipped.end > 0.2,
              "Clipped scores: {end:.0%} of scores exceed --score_clip at the end.",
              "a higher --score_clip; --normalise_scores sum.")),
    Rule("spread of scores", "ppo", "reward/std",
         when(lambda spread: spread.end < 1e-3,
              "Equal scores: reward/std is {end:.2g} at the end, which leaves nothing to learn from.",
              "look at the samples; a reward that distinguishes them; a higher --temperature.")),
    Rule("progress", "ppo", "kl/mean reward/mean",
         when(lambda kl, reward: kl.end < IDLE and abs(reward.end - reward.start) <= reward.noise,
              "Nothing is learnt: kl/mean is {end:.2g} nats at the end, and reward/mean went from"
              " {1.start:.3g} to {1.end:.3g}, within noise.",
              "a lower --kl_coef; a higher --actor_learning_rate; more steps."), FEWEST),
    Rule("limit of the cost", "ppo", "cost/mean cost/limit",
         when(lambda cost, limit: cost.end - limit.end > cost.noise,
              "Cost above its limit: cost/mean is {end:.3g} at the end, cost/limit {1.end:.3g}.",
              "more steps; a higher --lambda_rate or --lambda_max."), FEWEST, optional=True),
    Rule("jumps of KL", "ppo", "step kl/mean", checks_ppo.kl_jump, 2),
    Rule("level of KL", "ppo", "step kl/mean", checks_ppo.kl_too_large),
    Rule("critic", "ppo", "value/explained_var", checks_ppo.blind_critic, optional=True),
    Rule("clipped updates", "ppo", "policy/clip_fraction",
         when(lambda fraction: fraction.upper_quartile > 0.3,
              "Updates too large: policy/clip_fraction is {0.upper_quartile:.2f} or more in a quarter of the"
              " steps.",
              "a lower --actor_learning_rate; fewer --ppo_epochs; a larger --global_batch_size.")),
    Rule("size of updates", "ppo", "policy/approx_kl",
         when(lambda kl: kl.median > 0.1,
              "Updates too large: policy/approx_kl has a median of {0.median:.2g} nats per token.",
              "a lower --actor_learning_rate; fewer --ppo_epochs; a lower --max_update_kl, to end epochs"
              " early."), optional=True),
    Rule("gap of sampler and trainer", "ppo", "rollout/gap_mean rollout/ess",
         when(lambda gap, _: gap.end > 0.03,
              "Sampler and trainer disagree: rollout/gap_mean is {end:.2g} nats per token at the end, and"
              " rollout/ess {1.end:.0%}.",
              "a run in fp32: a gap that remains is no rounding; a lower --max_rollout_gap."), optional=True),
    Rule("ratio at the first minibatch", "ppo", "policy/ratio", checks_ppo.wrong_ratio, optional=True),
    Rule("forgetting", "ppo", "ptx/loss",
         when(lambda loss: loss.end > loss.start + 0.05 * abs(loss.start),
              "Forgetting: ptx/loss rose from {start:.3g} to {end:.3g}.",
              "a higher --ptx_coef; a lower --actor_learning_rate; a higher --kl_coef."),
         FEWEST, optional=True),
]  # fmt: skip
ALIKE = "answers that become alike"


class Judgement(NamedTuple):
    """Findings of the rules, and the amount of data behind them."""

    findings: list[Finding]
    unchecked: dict[str, list[str]]  # names of rules that could not be applied, by reason
    steps: int  # the last logged step
    logged: int  # lines of training metrics
    evaluations: int

    @property
    def is_short(self) -> bool:
        """Whether the run is too short to judge trends."""
        return self.steps < LEAST_STEPS or self.logged < FEWEST


def check_run(
    lines: Sequence[Line],
    samples: Sequence[Line] = (),
    stage: str = "",
    options: dict[str, Any] | None = None,
) -> Judgement:
    """Apply the rules of a stage to the lines of metrics.jsonl and of samples.jsonl."""
    findings, unchecked = [checks.not_finite(lines)], {}
    evaluations = sum(any(name.startswith("eval/") for name in line) for line in lines)
    logged = sum(any(not name.startswith(("eval/", "step")) for name in line) for line in lines)
    trained = [line for line in lines if line["step"] > 0]
    for rule in RULES:
        if not rule.applies(stage):
            continue
        groups = [columns(lines, *names) for names in rule.groups]
        is_at_0 = rule.is_of_evaluations and bool(groups[0][0]) and not any(columns(trained, *rule.groups[0]))
        if len(groups[0][0]) >= rule.fewest and not is_at_0:
            chosen = {name: options[name] for name in rule.options if options and name in options}
            findings.append(rule.check(*[values for group in groups for values in group], **chosen))
        elif stage and not rule.optional:
            reason = ONLY_AT_0 if is_at_0 else _missing(rule, len(groups[0][0]), evaluations)
            unchecked.setdefault(reason, []).append(rule.name)
    if stage in ("", "ppo"):
        findings.append(hacks.format_hack(samples, *columns(lines, "eval/score")))
    if stage == "ppo" and (reason := NO_EVALUATIONS * (not evaluations) or hacks.missing_samples(samples)):
        unchecked.setdefault(reason, []).append(ALIKE)
    steps = max((line["step"] for line in lines), default=0)
    return Judgement([one for one in findings if one], unchecked, steps, logged, evaluations)


def _missing(rule: Rule, count: int, evaluations: int) -> str:
    """Why a rule could not be applied, and the option that changes it."""
    if rule.is_of_evaluations and not evaluations:
        return NO_EVALUATIONS
    if not count:
        return rule.needs or f"{rule.groups[0][-1]} was not logged"
    if rule.is_of_evaluations:
        return f"{count} evaluations of at least {rule.fewest}: a lower --eval_steps"
    return f"{count} logged steps of at least {rule.fewest}: more steps, or a lower --logging_steps"
