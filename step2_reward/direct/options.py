"""Options of direct preference optimisation, and properties of each loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from common.runtime.option_checks import check_held_out, default_values
from common.runtime.options import BEST_METRIC, TrainOptions, UserError, option
from common.training.options import TrackerOptions, check_trackers


class Kind(NamedTuple):
    """Properties of a loss (see loss.py)."""

    beta: float = 0.1  # default, from the authors
    has_reference: bool = True
    is_averaged: bool = False  # over tokens, instead of summed
    has_nll: bool = False  # adds the negative log-likelihood of chosen responses
    nll_has_prompt: bool = False  # that of their prompts too


# As in their authors' code, ORPO's NLL includes the prompt, and CPO's does not.
KINDS = {
    "dpo": Kind(),
    "ipo": Kind(is_averaged=True),
    "kto": Kind(),
    "orpo": Kind(has_reference=False, is_averaged=True, has_nll=True, nll_has_prompt=True),
    "simpo": Kind(beta=2.0, has_reference=False, is_averaged=True),
    "hinge": Kind(),
    "robust": Kind(),
    "cpo": Kind(has_reference=False, has_nll=True),
}
# Options that only some losses take.
LOSSES_OF_OPTION = {
    "label_smoothing": ("dpo", "robust", "simpo", "cpo"),
    "ipo_sum": ("ipo",),
    "gamma_beta_ratio": ("simpo",),
    "nll_coef": ("orpo", "cpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_model_name_or_path": tuple(name for name, kind in KINDS.items() if kind.has_reference),
}


@dataclass
class DirectOptions(TrainOptions, TrackerOptions):
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
    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo", "hinge", "robust", "cpo"] = option(
        "dpo",
        "Loss of a pair or, for kto, of a single labelled response; loss.py has formulas and sources.",
    )
    beta: float = option(
        0.0, "Strength of the pull towards the reference. 0: default of the loss (simpo: 2; others: 0.1).",
        at_least=0,
    )  # fmt: skip
    label_smoothing: float = option(
        0.0,
        "Probability that a rater chose the wrong response; for dpo, simpo, cpo and robust.",
        at_least=0,
        at_most=0.49,
    )
    ipo_sum: bool = option(False, "ipo: sum over tokens, as in the paper, instead of the mean.")
    gamma_beta_ratio: float = option(0.25, "simpo: margin as gamma / beta.", at_least=0)
    nll_coef: float = option(
        1.0, "orpo, cpo: weight of the negative log-likelihood of chosen responses.", at_least=0
    )
    desirable_weight: float = option(1.0, "kto: weight of desirable responses.", at_least=0)
    undesirable_weight: float = option(1.0, "kto: weight of undesirable responses.", at_least=0)
    reference_model_name_or_path: str = option(
        "", "Reference policy: a folder or hub name. Default: --model_name_or_path.", resume="model"
    )

    def __post_init__(self) -> None:
        self.beta = self.beta or self.kind.beta

    @property
    def kind(self) -> Kind:
        """Properties of --loss."""
        kind = KINDS[self.loss]
        return kind._replace(is_averaged=kind.is_averaged and not self.ipo_sum)

    @property
    def is_paired(self) -> bool:
        return self.loss != "kto"

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
