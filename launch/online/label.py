"""Label pairs with a function; those of equal score are left out. Without pairs, only load the function.

python launch/online/label.py --gold_function FILE.py:NAME --pair_data pairs.jsonl --output preferences.jsonl
"""

from collections.abc import Sequence
from pathlib import Path

from common.data.journal import to_lines
from common.runtime.distributed import log
from common.runtime.files import write_text
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import run_main
from common.text.record_formats import Record
from launch.online.options import LabelOptions
from step2_reward.pairs import SIDES, Pair, read_pairs
from step3_ppo.reward_functions import RewardFunction, function_scores, load_functions


def main() -> None:
    options = parse_options(LabelOptions)
    functions = load_functions([options.gold_function], "gold_function")
    if not options.pair_data:
        return
    pairs = read_pairs(options.pair_data, [], skip_bad_records=False)
    records = label(pairs, functions[0])
    if not records:
        raise UserError(f"--gold_function {options.gold_function}: scores the responses of every pair alike")
    write_text(Path(options.output), to_lines(records))
    log(f"{options.output}: {len(records)} pairs; {len(pairs) - len(records)} of equal score left out")


def label(pairs: Sequence[Pair], function: RewardFunction) -> list[Record]:
    """Pairs with their `preference`, A or B, without those of equal score."""
    texts = [pair.record[side] for side in SIDES for pair in pairs]
    prompts, records = [pair.prompt for pair in pairs], [pair.record for pair in pairs]
    (scores,) = function_scores([function], prompts * 2, texts, records * 2)
    scores = [function.weight * score for score in scores]
    by_pair = zip(pairs, scores[: len(pairs)], scores[len(pairs) :], strict=True)
    return [pair.record | {"preference": "A" if a > b else "B"} for pair, a, b in by_pair if a != b]


if __name__ == "__main__":
    run_main(main)
