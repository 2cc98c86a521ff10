"""Refuse wrong options of commands that a script would reach hours later.

python -m launch.lib.check_options step2_direct --loss dpo --beta 0.3 -- evaluate_ppo --prompt_data F.jsonl
"""

import sys

from common.runtime.option_checks import check_held_out
from common.runtime.options import UserError, parse_options
from common.runtime.process import run_main
from step1_sft.options import SFTOptions
from step2_reward.direct.options import DirectOptions, complete
from step2_reward.options import RewardOptions
from step3_ppo.compare import options as evaluate_options
from step3_ppo.compare.options import EvaluateOptions
from step3_ppo.options import PPOOptions, check_options

# The options of a command, and the check of their combinations.
COMMANDS = {
    "step1_sft": (SFTOptions, check_held_out),
    "step2_reward": (RewardOptions, check_held_out),
    "step3_ppo": (PPOOptions, check_options),
    "step2_direct": (DirectOptions, complete),
    "evaluate_ppo": (EvaluateOptions, evaluate_options.check_options),
}


def main() -> None:
    words = sys.argv[1:]
    while words:
        end = words.index("--") if "--" in words else len(words)
        check_command(*words[:end])
        words = words[end + 1 :]


def check_command(command: str, *words: str) -> None:
    """Raise UserError, naming the command, for options that it would refuse."""
    options_class, check = COMMANDS[command]
    try:
        check(parse_options(options_class, [], [*words]))
    except UserError as error:
        raise UserError(f"launch/{command}.sh: {error}") from None


if __name__ == "__main__":
    run_main(main)
