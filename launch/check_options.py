"""Refuse now the options of a command that a script comes to hours later.

python -m launch.check_options step2_direct --loss dpo --beta 0.3
"""

import sys

from common.options import UserError, parse_options
from common.process import run_main
from step1_sft.options import SFTOptions
from step2_reward.direct.options import DirectOptions, complete
from step3_ppo.evaluate_options import EvaluateOptions, check_options

# Options of a command, and what looks at several of them together.
COMMANDS = {
    "step1_sft": (SFTOptions, lambda _: None),
    "step2_direct": (DirectOptions, complete),
    "evaluate_ppo": (EvaluateOptions, check_options),
}


def main() -> None:
    command, *words = sys.argv[1:]
    options_class, check = COMMANDS[command]
    try:
        check(parse_options(options_class, [], words))
    except UserError as error:
        raise UserError(f"launch/{command}.sh: {error}") from None


if __name__ == "__main__":
    run_main(main)
