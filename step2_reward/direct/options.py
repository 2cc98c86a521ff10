"""Options of direct preference optimisation, and what each loss is by its authors."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from common.runtime.option_checks import check_held_out, default_values
from common.runtime.options import BEST_METRIC, TrainOptions, UserError, option


class Kind(NamedTuple):
    """What a loss compares of two responses (see loss.py)."""

    beta: float = 0.1  # of its authors
    has_reference: bool = True
    is_averaged: bool = False  # over tokens, not summed
    has_nll: bool = False  # beside it, that of chosen responses
    nll_has_prompt: bool = False


# ORPO's NLL is, as in its authors' code, that of prompt and response; CPO's that of the response.
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
# Options that not every loss takes.
BELONGS = {
    "label_smoothing": ("dpo", "robust", "simpo", "cpo"),
    "ipo_sum": ("ipo",),
    "gamma_beta_ratio": ("simpo",),
    "nll_coef": ("orpo", "cpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_model_name_or_path": tuple(name for name, kind in KINDS.items() if kind.has_reference),
}


@dataclass
class DirectOptions(TrainOptions):
    """A policy from preferences, without a reward model and without sampling."""

    stage: ClassVar[int] = 2
    output_dir: str = option(
        "output/step2_direct", "Folder for logs, checkpoints and the final model.", resume="free"
    )
    learning_rate: float = option(
        1e-6,
        "Highest learning rate; as published for some 7 B parameters (orpo: 8e-6). Small models and LoRA take"
        " ten times as much and more.",
        above=0,
    )
    best_metric: Literal["none", "eval/loss", "eval/accuracy"] = option("none", BEST_METRIC)
    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo", "hinge", "robust", "cpo"] = option(
        "dpo", "What is learnt from a pair or, kto, from single responses with a label."
    )
    beta: float = option(
        0.0, "How closely the policy stays at the reference; 0: 2 for simpo, 0.1 for the others.", at_least=0
    )
    label_smoothing: float = option(
        0.0,
        "Probability that a rater chose the wrong response: conservative dpo (also simpo, cpo), or robust.",
        at_least=0,
        at_most=0.49,
    )
    ipo_sum: bool = option(False, "ipo: sum over tokens, as in its paper, instead of the mean over them.")
    gamma_beta_ratio: float = option(0.25, "simpo: the margin, gamma / beta.", at_least=0)
    nll_coef: float = option(
        1.0, "orpo, cpo: weight of the negative log-likelihood of chosen responses.", at_least=0
    )
    desirable_weight: float = option(1.0, "kto: weight of desirable responses.", at_least=0)
    undesirable_weight: float = option(1.0, "kto: weight of undesirable responses.", at_least=0)
    reference_model_name_or_path: str = option(
        "", "The reference policy, a folder or hub name. Default: the model to start from.", resume="model"
    )

    @property
    def kind(self) -> Kind:
        """What --loss compares."""
        kind = KINDS[self.loss]
        return kind._replace(is_averaged=kind.is_averaged and not self.ipo_sum)

    @property
    def is_paired(self) -> bool:
        return self.loss != "kto"

    def check(self) -> None:
        """Set beta where it is left to the loss. Raises UserError for options that contradict each other."""
        check_held_out(self)
        defaults = default_values(self)
        for name, losses in BELONGS.items():
            value = getattr(self, name)
            if value != defaults[name] and self.loss not in losses:
                raise UserError(
                    f"--{name} {value}: --loss {self.loss} does not take it; it belongs to {' '.join(losses)}"
                )
        self.beta = self.beta or self.kind.beta
