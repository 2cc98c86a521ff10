"""Options of direct preference optimisation, and properties of each loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from common.runtime.option_checks import check_held_out, default_values
from common.runtime.options import BEST_METRIC, TrainOptions, UserError, option
from common.training.options import TrackerOptions, check_trackers


class Kind(NamedTuple):
    """Properties of a loss (see loss.py)."""

    beta: float = 0.1  # default, from the authors where it differs
    label_smoothing: float = 0.0  # default
    is_paired: bool = True  # else of single labelled responses
    has_reference: bool = True
    has_point: bool = False  # subtracts KTO's estimate of KL, from unrelated responses
    is_averaged: bool = False  # over tokens, instead of summed
    is_sorted: bool = False  # compares sorted rewards of the global batch
    takes_f_divergence: bool = False  # depends on the difference of rewards alone
    has_nll: bool = False  # adds the negative log-likelihood of chosen responses
    nll_has_prompt: bool = False  # that of their prompts too


# As in their authors' code, ORPO's NLL includes the prompt, and CPO's does not.
KINDS = {
    "dpo": Kind(takes_f_divergence=True),
    "ipo": Kind(is_averaged=True, takes_f_divergence=True),
    "kto": Kind(is_paired=False, has_point=True),
    "orpo": Kind(has_reference=False, is_averaged=True, has_nll=True, nll_has_prompt=True),
    "simpo": Kind(beta=2.0, has_reference=False, is_averaged=True),
    "simpo_hinge": Kind(beta=2.0, has_reference=False, is_averaged=True),
    "hinge": Kind(takes_f_divergence=True),
    "robust": Kind(takes_f_divergence=True),
    "cpo": Kind(has_reference=False, has_nll=True),
    "cpo_hinge": Kind(has_reference=False, has_nll=True),
    "sigmoid_norm": Kind(beta=5.0, is_averaged=True, takes_f_divergence=True),
    "exo_pair": Kind(label_smoothing=1e-3, takes_f_divergence=True),
    "discopop": Kind(takes_f_divergence=True),
    "nca_pair": Kind(),
    "bco_pair": Kind(),
    "sppo_hard": Kind(),
    "apo_zero": Kind(),
    "apo_down": Kind(),
    "apo_zero_unpaired": Kind(is_paired=False),
    "aot": Kind(is_sorted=True),
    "aot_unpaired": Kind(is_sorted=True),
}


def losses_with(**properties: bool) -> tuple[str, ...]:
    """Names of the losses with these properties."""
    return tuple(
        name
        for name, kind in KINDS.items()
        if all(getattr(kind, key) == value for key, value in properties.items())
    )


# Options that only some losses take.
LOSSES_OF_OPTION = {
    "label_smoothing": ("dpo", "robust", "simpo", "cpo", "exo_pair", "aot", "aot_unpaired"),
    "ipo_sum": ("ipo",),
    "gamma_beta_ratio": ("simpo", "simpo_hinge"),
    "alphapo_alpha": ("simpo", "simpo_hinge", "cpo", "cpo_hinge"),
    "nll_coef": losses_with(has_nll=True),
    "desirable_weight": losses_with(is_paired=False),
    "undesirable_weight": losses_with(is_paired=False),
    "discopop_temperature": ("discopop",),
    "bco_shift": ("bco_pair",),
    "f_divergence": losses_with(takes_f_divergence=True),
    "ld_alpha": losses_with(is_paired=True, has_reference=True),
    "wpo": losses_with(is_paired=True, is_sorted=False),
    "reference_model_name_or_path": losses_with(has_reference=True),
}


@dataclass
class LossOptions:
    """Loss."""

    loss: Literal[
        "dpo", "ipo", "kto", "orpo", "simpo", "simpo_hinge", "hinge", "robust", "cpo", "cpo_hinge",
        "sigmoid_norm", "exo_pair", "discopop", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
        "apo_zero_unpaired", "aot", "aot_unpaired",
    ] = option(
        "dpo",
        "Loss of a pair or, for kto and apo_zero_unpaired, of a single labelled response; loss.py has the"
        " formulas and their sources.",
    )  # fmt: skip
    beta: float = option(
        0.0,
        "Strength of the pull towards the reference. 0: default of the loss (simpo, simpo_hinge: 2;"
        " sigmoid_norm: 5; others: 0.1).",
        at_least=0,
    )
    label_smoothing: float = option(
        0.0,
        "Probability that a rater chose the wrong response; for dpo, simpo, cpo, robust, aot, aot_unpaired"
        " and exo_pair (0: 0.001).",
        at_least=0,
        at_most=0.49,
    )
    ipo_sum: bool = option(False, "ipo: sum over tokens, as in the paper, instead of the mean.")
    gamma_beta_ratio: float = option(0.25, "simpo, simpo_hinge: margin as gamma / beta.", at_least=0)
    alphapo_alpha: float = option(
        0.0, "AlphaPO, for simpo and cpo: reward (1 - p^-alpha) / alpha in place of log p. 0: log p.",
        at_least=-10, at_most=10,
    )  # fmt: skip
    nll_coef: float = option(
        1.0, "orpo, cpo: weight of the negative log-likelihood of chosen responses.", at_least=0
    )
    desirable_weight: float = option(
        1.0, "kto, apo_zero_unpaired: weight of desirable responses.", at_least=0
    )
    undesirable_weight: float = option(
        1.0, "kto, apo_zero_unpaired: weight of undesirable responses.", at_least=0
    )
    discopop_temperature: float = option(
        0.05, "discopop: temperature of the mixture of its two terms.", above=0
    )
    bco_shift: bool = option(False, "bco_pair: subtract the running mean of rewards, as in the paper.")
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = option(
        "reverse_kl",
        "Divergence that holds the policy at the reference, for losses of a difference of rewards.",
    )
    f_divergence_alpha: float = option(
        0.5, "alpha of alpha_divergence: 0 is forward_kl, 1 is reverse_kl.", at_least=-10, at_most=10
    )
    ld_alpha: float = option(
        1.0,
        "LD-DPO: weight of response tokens beyond the length of the shortest response to the prompt.",
        at_least=0,
        at_most=1,
    )
    wpo: bool = option(
        False, "WPO: weigh a pair by how likely the policy is to sample its responses; not for aot."
    )


@dataclass
class DirectOptions(TrainOptions, LossOptions, TrackerOptions):
    """Direct preference optimisation of a policy, without a reward model and without sampling."""

    stage: ClassVar[int] = 2
    output_dir: str = option(
        "output/step2_direct", "Folder for logs, checkpoints and the final model.", resume="free"
    )
    learning_rate: float = option(
        1e-6,
        "Peak learning rate. The default is for about 7 B parameters (orpo: 8e-6); small models and LoRA need"
        " ten times as much or more.",
        above=0,
    )
    best_metric: Literal["none", "eval/loss", "eval/accuracy"] = option("none", BEST_METRIC)
    reference_model_name_or_path: str = option(
        "", "Reference policy: a folder or hub name. Default: --model_name_or_path.", resume="model"
    )

    def __post_init__(self) -> None:
        self.beta = self.beta or self.kind.beta
        self.label_smoothing = self.label_smoothing or self.kind.label_smoothing

    @property
    def kind(self) -> Kind:
        """Properties of --loss."""
        kind = KINDS[self.loss]
        return kind._replace(is_averaged=kind.is_averaged and not self.ipo_sum)

    @property
    def is_paired(self) -> bool:
        return self.kind.is_paired

    def check(self) -> None:
        """Raise UserError for options that contradict each other."""
        check_held_out(self)
        check_trackers(self)
        defaults = default_values(self)
        for name, losses in LOSSES_OF_OPTION.items():
            value = getattr(self, name)
            if value != defaults[name] and self.loss not in losses:
                raise UserError(
                    f"--{name} {value}: --loss {self.loss} does not take it; allowed: {', '.join(losses)}"
                )
        if self.f_divergence_alpha != defaults["f_divergence_alpha"] and (
            self.f_divergence != "alpha_divergence"
        ):
            raise UserError(
                f"--f_divergence_alpha {self.f_divergence_alpha}: needs --f_divergence alpha_divergence"
            )
