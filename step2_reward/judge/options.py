"""Options of a model that compares responses."""

from dataclasses import dataclass

from common.ai_feedback.options import SHIPPED, ConstitutionOptions
from common.runtime.options import option


@dataclass
class JudgeOptions(ConstitutionOptions):
    """Two responses compared by a model, in both orders, by a constitution."""

    preference_data: list[str] = option(
        [],
        "Pairs or rankings as step 2 reads them, with or without `preference`: files or hub names.",
        required=True,
        resume="data",
    )
    max_eval_samples: int = option(0, "Judge at most this many pairs; 0: all.", at_least=0, resume="free")
    output_dir: str = option("output/judge", "Folder for preferences.jsonl and report.json.", resume="free")
    max_length: int = option(
        4096, "Longest question in tokens; a pair with a longer one is left out.", at_least=8
    )
    micro_batch_size: int = option(
        8, "Questions that one rank puts through the model at once.", at_least=1, resume="free"
    )
    judge_template: str = option(
        str(SHIPPED / "judge.txt"),
        "How to ask for A or B: text with {prompt} {response_a} {response_b} {principle}.",
        resume="data",
    )
