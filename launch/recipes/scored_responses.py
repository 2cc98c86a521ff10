"""Scored responses for step2_ilql.sh from preferences: all their responses, scored by a function.

.venv/bin/python launch/recipes/scored_responses.py FILE.py:NAME preferences.jsonl scored.jsonl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.data.journal import to_lines
from common.data.records import read_all
from common.runtime.files import write_text
from common.runtime.options import UserError
from common.runtime.process import run_main
from common.text.record_formats import Record, normalise_record
from common.text.segments import Comparison, parse_comparison
from step3_ppo.reward_functions import function_scores, load_functions


def main() -> None:
    if len(sys.argv) != 4:
        raise UserError("usage: launch/recipes/scored_responses.py FILE.py:NAME PREFERENCES OUTPUT")
    functions = load_functions(sys.argv[1:2], "function")
    preferences, _ = read_all(sys.argv[2:3], compared, skip_bad_records=False, is_training=True)
    rows: list[Record] = [
        {"prompt": one.prompt, "response": text} for one in preferences for text in one.responses.values()
    ]
    prompts, responses = ([row[name] for row in rows] for name in ("prompt", "response"))
    (scores,) = function_scores(functions, prompts, responses, rows)
    lines = to_lines([row | {"score": score} for row, score in zip(rows, scores, strict=True)])
    write_text(Path(sys.argv[3]), lines)


def compared(record: Record) -> Comparison:
    """The responses of a preference."""
    return parse_comparison(normalise_record(record))


if __name__ == "__main__":
    run_main(main)
