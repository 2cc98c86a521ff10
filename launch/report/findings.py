"""The rules of the report, and their application to the metrics of a run. Pure."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from launch.report import checks, checks_kl, checks_ppo, hacks
from launch.report.read import Line, columns
from launch.report.rule import Finding, Rule
from launch.report.trends import FEWEST

LEAST_STEPS = 10  # of a run, with FEWEST logged ones, to judge its trends
GOLD = "no gold score: --gold_reward_model or --gold_function"
ONLY_AT_0 = "the only evaluation is at step 0, before training: a lower --eval_steps"
NO_EVALUATIONS = "no evaluations: --eval_data or --eval_fraction, and --eval_steps"
TRAINED = "sft reward direct"
RULES = [
    Rule("skipped updates", checks.skipped_updates, (("step", "train/skipped_updates"),), f"{TRAINED} ppo"),
    *[
        Rule(f"size of {name}", partial(checks.large_gradients, name), ((name,),), stages, optional=True)
        for name, stages in (
            ("train/grad_norm", TRAINED), ("policy/grad_norm", "ppo"), ("value/grad_norm", "ppo"),
        )
    ],
    Rule("learning rate", checks.zero_rate, (("train/lr",),), f"{TRAINED} ppo", fewest=2),
    Rule("trend of train/loss", checks.rising_loss, (("train/loss",), ("eval/loss",)), TRAINED, FEWEST),
    Rule("level of the loss", checks.high_loss, (("train/loss",),), "sft"),
    Rule("overfitting", checks.overfitting, (("step", "eval/loss"), ("step", "train/loss")), TRAINED, 2),
    Rule("held-out loss against a coin toss", checks.coin_toss, (("eval/loss",),), "reward direct",
         options=("use_margin", "loss")),
    Rule("training loss against a coin toss", checks.coin_toss_in_training, (("train/loss",), ("eval/loss",)),
         "reward direct", FEWEST, options=("use_margin", "loss", "centre_coef", "lm_loss_coef")),
    Rule("held-out accuracy", checks.low_accuracy, (("eval/accuracy",),), "reward direct"),
    Rule("gap of accuracies", checks.accuracy_gap, (("eval/accuracy",), ("train/accuracy",)),
         "reward direct"),
    Rule("spread of scores", checks.equal_scores, (("eval/chosen_std",),), "reward", optional=True),
    Rule("NLL of chosen responses", checks.unlearning, (("eval/nll_chosen",),), "direct", 2),
    Rule("margin", checks.wrong_side, (("eval/margin",),), "reward direct", optional=True),
    Rule("distance on the data", checks.far_on_data, (("logratio/mean",),), "direct", optional=True),
    Rule("over-optimisation", hacks.over_optimisation, (("step", "eval/score", "eval/gold"),), "ppo", FEWEST,
         needs=GOLD),
    Rule("fall of gold", hacks.falling_gold, (("step", "eval/score", "eval/gold"),), "ppo", 2, optional=True),
    Rule("fall of the held-out score", checks_ppo.falling_score,
         (("step", "eval/score"), ("eval/score_std",)), "ppo", 2),
    Rule("gain for the KL", checks_kl.kl_without_gain, (("eval/kl", "eval/score"), ("eval/score_std",)),
         "ppo", FEWEST),
    Rule("fall of reward/mean", checks_ppo.falling_reward, (("reward/mean",),), "ppo", FEWEST),
    Rule("length hack", hacks.length_hack, (("reward/mean", "response/length"),), "ppo", FEWEST),
    Rule("repetition", hacks.repetition,
         (("response/repeated_3",), ("response/distinct_2",), ("reward/mean",)), "ppo"),
    Rule("entropy", checks_ppo.entropy_collapse, (("policy/entropy",),), "ppo"),
    Rule("diversity", checks_ppo.diversity_collapse, (("eval/distinct_2",),), "ppo"),
    Rule("truncated responses", checks_ppo.truncation, (("response/eos_rate",),), "ppo",
         options=("missing_eos_penalty",)),
    Rule("length at the limit", checks_ppo.near_limit, (("response/length",), ("response/eos_rate",)), "ppo",
         options=("max_response_length", "missing_eos_penalty")),
    Rule("shrinking responses", checks_ppo.short_responses, (("response/length",),), "ppo", FEWEST),
    Rule("penalties", checks_ppo.large_penalties, (("reward/penalty", "reward/std"),), "ppo",
         options=("normalise_scores",)),
    Rule("clipped scores", checks_ppo.clipped_scores, (("reward/clipped",),), "ppo"),
    Rule("spread of scores", checks_ppo.equal_scores, (("reward/std",),), "ppo"),
    Rule("progress", checks_kl.kl_too_small, (("kl/mean", "reward/mean"),), "ppo", FEWEST),
    Rule("jumps of KL", checks_kl.kl_jump, (("step", "kl/mean"),), "ppo", 2),
    Rule("level of KL", checks_kl.kl_too_large, (("step", "kl/mean"),), "ppo"),
    Rule("critic", checks_ppo.blind_critic, (("value/explained_var",),), "ppo", optional=True),
    Rule("clipped updates", checks_ppo.clipped_updates, (("policy/clip_fraction",),), "ppo"),
    Rule("size of updates", checks_kl.large_updates, (("policy/approx_kl",),), "ppo", optional=True),
    Rule("ratio at the first minibatch", checks_kl.wrong_ratio, (("policy/ratio",),), "ppo", optional=True),
    Rule("forgetting", checks_ppo.forgetting, (("ptx/loss",),), "ppo", FEWEST, optional=True),
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
