"""Options of commands that ask a model about responses."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.runtime.options import option

SHIPPED = Path(__file__).parent / "templates"


@dataclass
class ConstitutionOptions:
    """Model and principles."""

    resume_from_checkpoint: ClassVar[str] = "latest"  # the same command always goes on

    model_name_or_path: str = option("", "The model that is asked: a folder or hub name.", required=True)
    constitution: str = option(
        str(SHIPPED / "constitution.yaml"), "Principles: a YAML list, or a text file with one per line."
    )
    default_chat_template: bool = option(
        False, "Ask a model without a chat template as `Human: ... Assistant:`; else it is refused."
    )
    seed: int = option(0, "Seed of principles and of sampling.", at_least=0)
    skip_bad_records: bool = option(False, "Count and skip malformed records instead of stopping.")
    zero_config: str = option(
        "", "DeepSpeed JSON that says precision, and partitions at stage 3. Default: as in training."
    )
    timeout_minutes: float = option(
        30.0, "How long a rank waits for the slowest one before it gives up.", above=0
    )
