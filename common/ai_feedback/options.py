"""Options of the commands that use a model for AI feedback."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.runtime.options import InferenceOptions, RankOptions, option

SHIPPED = Path(__file__).parent / "templates"


@dataclass
class ConstitutionOptions(InferenceOptions, RankOptions):
    """Model and principles."""

    resume_from_checkpoint: ClassVar[str] = "latest"  # the same command always resumes

    model_name_or_path: str = option(
        "", "Model that gives the feedback: a folder or hub name.", required=True, resume="model"
    )
    constitution: str = option(
        str(SHIPPED / "constitution.yaml"),
        "Principles: a YAML list, or a text file with one per line.",
        resume="data",
    )
    default_chat_template: bool = option(
        False, "Prompt a model without a chat template as `Human: ... Assistant:` instead of refusing it."
    )
    seed: int = option(0, "Seed for principles and sampling.", at_least=0)
    skip_bad_records: bool = option(False, "Count and skip malformed records instead of stopping.")
