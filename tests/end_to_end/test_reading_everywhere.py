"""Every command reads data the same way: bad records, weights, text in CSV."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.runtime.options import UserError
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step1_sft import critique
from step2_reward import pairs as annotate_pairs
from step2_reward.annotate import sample_pairs
from step2_reward.evaluation import main as evaluate_reward
from step2_reward.evaluation import score_file as score
from step2_reward.judge import main as judge
from step2_reward.options import EvaluateRewardOptions
from step3_ppo.best_of_n import main as best_of_n
from step3_ppo.best_of_n.options import BestOfNOptions
from step3_ppo.compare import main as evaluate_ppo
from step3_ppo.compare.options import ComparePoliciesOptions

PAIRS = [{"prompt": f"question {n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(60)]
BAD = r'{"prompt": "smile", "chosen": "a", "rejected": "b", "completion": "c", "id": "half \ud83d"}'
Read = Callable[[str, bool, SegmentEncoder], list[str]]  # (source, skip, encoder) -> prompts that it uses


def _of_pairs(pairs: list[annotate_pairs.Pair]) -> list[str]:
    return [pair.prompt for pair in pairs]


def _of_prompts(rows: Any) -> list[str]:
    return [row.record["prompt"] for row in rows]


def _score(source: str, skip: bool, encoder: SegmentEncoder) -> list[str]:
    options = score.ScoreOptions(input=source, skip_bad_records=skip)
    return [record["prompt"] for record, _ in score.read_examples(options, [encoder], 0)]


def _evaluate_reward(source: str, skip: bool, encoder: SegmentEncoder) -> list[str]:
    options = EvaluateRewardOptions(skip_bad_records=skip)
    pairs = evaluate_reward.load_pairs([source], [encoder], options, 64)
    return [record["prompt"] for record in pairs.records]


READ: dict[str, Read] = {
    "score": _score,
    "evaluate_reward": _evaluate_reward,
    "judge": lambda source, skip, _: _of_pairs(judge.read_judge_pairs([source], skip)),
    "annotate": lambda source, skip, _: _of_pairs(annotate_pairs.read_pairs([source], [], skip)),
    "sample_pairs": lambda source, skip, encoder: _of_prompts(
        sample_pairs.load_prompts(
            sample_pairs.SamplePairsOptions(prompt_data=[source], skip_bad_records=skip), [encoder] * 2
        )[1]
    ),
    "critique": lambda source, skip, encoder: _of_prompts(
        critique.load_prompts(critique.CritiqueOptions(prompt_data=[source], skip_bad_records=skip), encoder)
    ),
    "best_of_n": lambda source, skip, encoder: _of_prompts(
        best_of_n.load_prompts(
            BestOfNOptions(prompt_data=[source], skip_bad_records=skip, eval_fraction=0), encoder
        )
    ),
    "evaluate_ppo": lambda source, skip, encoder: _of_prompts(
        evaluate_ppo.load_prompts(
            ComparePoliciesOptions(eval_data=[source], skip_bad_records=skip, max_eval_samples=0), encoder
        )
    ),
}


@pytest.fixture(scope="module")
def encoder(world: Path) -> SegmentEncoder:
    return SegmentEncoder(load_tokenizer(str(world / "model")))


def lines(command: str) -> list[str]:
    """Pairs in the format of the command."""
    if command == "score":
        return [json.dumps({"prompt": pair["prompt"], "completion": pair["chosen"]}) for pair in PAIRS]
    if command == "annotate":
        sides = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in PAIRS]
        names = ("prompt", "response_a", "response_b")
        return [json.dumps(dict(zip(names, side, strict=True))) for side in sides]
    return [json.dumps(pair) for pair in PAIRS]


@pytest.mark.parametrize("command", READ)
def test_lone_surrogate_is_a_bad_record_in_every_command(
    tmp_path: Path, encoder: SegmentEncoder, command: str
) -> None:
    """Also in a field that the command only copies."""
    path, read = tmp_path / "data.jsonl", READ[command]
    path.write_text("\n".join([lines(command)[0], BAD, *lines(command)[1:3]]))
    with pytest.raises(
        UserError, match=r"data\.jsonl:2: field 'id' has half a character \(\\ud83d\)"
    ) as error:
        read(str(path), False, encoder)
    assert "\n" not in str(error.value)
    assert read(str(path), True, encoder) == [pair["prompt"] for pair in PAIRS[:3]]


@pytest.mark.parametrize("command", READ)
def test_weight_selects_the_same_records_in_every_command(
    tmp_path: Path, encoder: SegmentEncoder, command: str
) -> None:
    path, read = tmp_path / "data.jsonl", READ[command]
    path.write_text("\n".join(lines(command)))
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    expected = READ["critique"](f"{tmp_path / 'plain.jsonl'}:0.4", False, encoder)
    assert 10 < len(expected) < 40
    assert read(f"{path}:0.4", False, encoder) == expected


@pytest.mark.parametrize("command", READ)
def test_text_in_csv_stays_text_in_every_command(
    tmp_path: Path, encoder: SegmentEncoder, command: str
) -> None:
    prompts = ["None", "NA", "null", "007", "1.50", "True", "2024-01-02"]
    records = [
        {**json.loads(line), "prompt": prompt} for line, prompt in zip(lines(command), prompts, strict=False)
    ]
    with (tmp_path / "data[1].csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    assert READ[command](str(tmp_path / "data[1].csv"), False, encoder) == prompts
