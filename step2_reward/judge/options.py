"""Options of the judge."""

from dataclasses import dataclass

from common.ai_feedback.options import SHIPPED, ConstitutionOptions
from common.runtime.options import option


@dataclass
class JudgeOptions(ConstitutionOptions):
    """AI preferences: a model compares two responses in both orders, by a constitution."""

    preference_data: list[str] = option(
        [],
        "Pairs or rankings in the formats of step 2, with or without `preference`: files or hub names.",
        required=True,
        resume="data",
    )
    max_eval_samples: int = option(0, "Judge at most this many pairs; 0: all.", at_least=0, resume="free")
    output_dir: str = option("output/judge", "Folder for preferences.jsonl and report.json.", resume="free")
    max_length: int = option(
        4096, "Maximum question length in tokens; pairs with longer questions are dropped.", at_least=8
    )
    micro_batch_size: int = option(8, "Questions per rank and forward pass.", at_least=1, resume="free")
    judge_template: str = option(
        str(SHIPPED / "judge.txt"),
        "Question of the judge: a text file with {prompt} {response_a} {response_b} {principle}.",
        resume="data",
    )
