"""Warnings of options on which nothing depends beside the others, or that leave nothing to train."""

from common.runtime.distributed import log
from common.runtime.option_checks import default_values
from step3_ppo.options import PPOOptions

ESTIMATORS = {  # that take an option
    "gae_lambda": ("gae",), "whiten_advantages": ("gae",), "value_clip_range": ("gae",),
    "critic_learning_rate": ("gae",), "gamma": ("gae", "reinforce", "reinforce_pp"),
    "reinforce_baseline": ("reinforce",), "group_std": ("group",),
}  # fmt: skip


def warn_of_idle(options: PPOOptions) -> None:
    """Warn of options with other values than their defaults that change nothing in this run."""
    if idle := idle_options(options):
        log(f"warning: without effect: {'; '.join(idle)}")


def warn_of_long_warmup(options: PPOOptions, iterations: int) -> None:
    """Warn of a critic's warmup that leaves the actor no iteration."""
    if options.critic_warmup_steps >= iterations and not options.critic_warmup_until:
        log(
            f"warning: --critic_warmup_steps {options.critic_warmup_steps}: all {iterations} iterations train"
            " the critic alone; the policy stays as it is"
        )


def idle_options(options: PPOOptions) -> list[str]:
    """The options that change nothing, each with the reason."""
    defaults = default_values(options)
    given = {name: value for name, value in vars(options).items() if value != defaults.get(name, value)}
    estimator = options.advantage_estimator
    idle = [
        f"--{name} with --advantage_estimator {estimator}"
        for name, takers in ESTIMATORS.items()
        if name in given and estimator not in takers
    ]
    if options.kl_controller == "fixed":
        idle += [
            f"--{name} with --kl_controller fixed" for name in ("kl_target", "kl_horizon") if name in given
        ]
    if "gae_lambda" in given and options.length_adaptive_lambda and options.critic_gae_lambda:
        idle.append("--gae_lambda with --length_adaptive_lambda and --critic_gae_lambda")
    return idle
