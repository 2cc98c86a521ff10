"""Check the options of commands, or print their help, before any library is loaded.

    python -m launch.lib.check_options step1_sft --model_name_or_path M --train_data F
    python -m launch.lib.check_options step1_sft --help
    python -m launch.lib.check_options --later step2_direct --loss dpo -- evaluate_ppo --prompt_data F.jsonl

--later: for commands that a script runs later; required options may still be missing.
"""

import re
import sys
from pathlib import Path
from pkgutil import resolve_name

from common.runtime.option_parser import parse_options
from common.runtime.options import UserError

REFUSED = 2  # as in common/runtime/process.py, which takes seconds to import
COMMANDS = {
    "annotate": "step2_reward.annotate.options.AnnotateOptions",
    "best_of_n": "step3_ppo.best_of_n.options.BestOfNOptions",
    "chat": "launch.chat.options.ChatOptions",
    "critique": "step1_sft.options.CritiqueOptions",
    "evaluate_ppo": "step3_ppo.compare.options.ComparePoliciesOptions",
    "evaluate_reward": "step2_reward.options.EvaluateRewardOptions",
    "evaluate_sft": "step1_sft.options.EvaluateSFTOptions",
    "judge": "step2_reward.judge.options.JudgeOptions",
    "plan": "launch.plan.options.PlanOptions",
    "sample_pairs": "step2_reward.annotate.options.SamplePairsOptions",
    "score": "step2_reward.options.ScoreOptions",
    "step1_sft": "step1_sft.options.SFTOptions",
    "step2_direct": "step2_reward.direct.options.DirectOptions",
    "step2_ilql": "step2_reward.ilql.options.ILQLOptions",
    "step2_process": "step2_reward.process.options.ProcessRewardOptions",
    "step2_reward": "step2_reward.options.RewardOptions",
    "step3_ppo": "step3_ppo.options.PPOOptions",
    "step3_safe": "step3_ppo.safe.options.SafeOptions",
}


def main() -> None:
    words = sys.argv[1:]
    try:
        if words[0] != "--later":
            if not words[1:]:
                raise UserError(f"options are required: {example(words[0])} (--help lists all)")
            check_command(words[0], words[1:])
            return
        words = words[1:]
        while words:
            end = words.index("--") if "--" in words else len(words)
            check_later_command(words[0], words[1:end])
            words = words[end + 1 :]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def check_command(command: str, words: list[str], check_required: bool = True) -> None:
    """Raise UserError for options that the command refuses. With --help, print the help and exit."""
    parse_options(resolve_name(COMMANDS[command]), words, f"{example(command)} [options]", check_required)


def example(command: str) -> str:
    """How a script is called, from the comment at its top."""
    script = Path(__file__).parents[1] / f"{command}.sh"
    lines = re.search(r"^#   (bash (?:.*\\\n)*.*)", script.read_text(), re.MULTILINE)[1]
    return re.sub(r"\s*\\\n#\s*", " ", lines).partition("   ")[0]


def check_later_command(command: str, words: list[str]) -> None:
    """Raise UserError, with the name of the command, for options that it refuses."""
    if command not in COMMANDS:  # the user's options hold the separator
        raise UserError("unknown option --; --help lists all options")
    try:
        check_command(command, words, check_required=False)
    except UserError as error:
        raise UserError(f"launch/{command}.sh: {error}") from None


if __name__ == "__main__":
    main()
