"""Options of the tools of launch/online.sh."""

from dataclasses import dataclass

from common.runtime.options import option


@dataclass
class LabelOptions:
    """Preferences by a function: the response with the higher score is the better one."""

    gold_function: str = option("", "The function: FILE.py:NAME, as in step 3.", required=True)
    pair_data: list[str] = option(
        [], "Pairs: prompt + response_a + response_b. Unset: only load the function."
    )
    output: str = option("", "JSONL file for step 2.")


@dataclass
class RoundsOptions:
    """Table of the rounds."""

    output_dir: str = option("", "OUTPUT of launch/online.sh.", required=True)
