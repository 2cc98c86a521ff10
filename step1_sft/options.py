"""Options of step 1."""

from dataclasses import dataclass
from typing import Literal

from common.options import TrainOptions, option


@dataclass
class SFTOptions(TrainOptions):
    """Supervised fine-tuning on demonstrations: `prompt` + `completion`, or `messages`."""

    output_dir: str = option("output/step1_sft", "Folder for logs, checkpoints and the final model.")
    loss_on: Literal["response", "prompt_and_response"] = option(
        "response", "Learn from every assistant turn only, or from all tokens."
    )
    num_samples: int = option(
        4, "Answers to held-out prompts written to TensorBoard at each evaluation.", at_least=0
    )
    sample_length: int = option(64, "Longest such answer, in tokens.", at_least=1)
