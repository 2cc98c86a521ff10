"""Pairs for a cost model: order, signs, and records that lack them; a cost model from data to evaluation."""

import json
from pathlib import Path

import pytest

from common.text.record_formats import normalise_record
from launch.quickstart.world import OFFERS
from step2_reward.data import Layout, collate, tokenize_harm
from step2_reward.harm import harmful_first
from tests.ranks import run_stage, succeed
from tests.stages import LORA, metrics, reward
from tests.word_encoder import EOS, PAD, WordEncoder

PAIR = {"prompt": "a b", "chosen": "c", "rejected": "d e"}
SIGNS = {"chosen_is_harmful": False, "rejected_is_harmful": True}
PKU = {
    "prompt": "a b", "response_0": "c", "response_1": "d e", "is_response_0_safe": False,
    "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
}  # fmt: skip


def test_the_more_harmful_response_is_first():
    ordered, signs = harmful_first(PAIR | SIGNS | {"chosen_ended": False})
    assert (ordered["chosen"], ordered["rejected"], signs) == ("d e", "c", [1.0, -1.0])
    assert "chosen_ended" not in ordered and ordered["rejected_ended"] is False
    ordered, signs = harmful_first(PAIR | SIGNS | {"safer": "rejected"})
    assert (ordered["chosen"], signs) == ("c", [-1.0, 1.0])


def test_tokens_and_signs_of_a_pair():
    row, _ = tokenize_harm(PAIR | SIGNS, WordEncoder(), 64, "drop")
    assert row.responses == [[12, 13, EOS], [12, EOS]] and row.signs == [1.0, -1.0]
    batch = collate([row], Layout(PAD))
    assert (batch.better_signs.tolist(), batch.worse_signs.tolist()) == ([1.0], [-1.0])
    tie, _ = tokenize_harm(PAIR | SIGNS | {"tie": True}, WordEncoder(), 64, "drop")
    assert tie.ranks == [0.0, 0.0] and tie.signs == [1.0, -1.0]


def test_the_safer_response_of_pku_is_not_always_the_better_one():
    record = normalise_record(PKU)
    assert (record["chosen"], record["rejected"], record["safer"]) == ("c", "d e", "rejected")
    assert (record["chosen_is_harmful"], record["rejected_is_harmful"]) == (True, False)
    assert harmful_first(record)[1] == [1.0, -1.0] and harmful_first(record)[0]["chosen"] == "c"
    safer_only = normalise_record({k: v for k, v in PKU.items() if k != "better_response_id"})
    assert (safer_only["chosen"], safer_only["safer"]) == ("d e", "chosen")
    as_text = {k: str(v) for k, v in PKU.items()}  # as in CSV
    assert harmful_first(normalise_record(as_text))[1] == [1.0, -1.0]
    assert normalise_record({"prompt": "a", "response_0": "b"}) == {"prompt": "a", "response_0": "b"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PAIR, "'chosen_is_harmful' is missing"),
        (PAIR | {"chosen_is_harmful": False}, "'rejected_is_harmful' is missing"),
        (PAIR | SIGNS | {"rejected_is_harmful": "no"}, "must be true or false"),
        (PAIR | SIGNS | {"safer": "both"}, "field 'safer' is 'both'"),
        ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}, "learns from pairs"),
        (PKU | {"safer_response_id": 2}, "'safer_response_id' is 2; it must be 0 or 1"),
        (PKU | {"is_response_1_safe": 3}, "'is_response_1_safe' is 3"),
        ({k: v for k, v in PKU.items() if k != "response_1"}, "'response_1' is missing"),
    ],
)
def test_incomplete_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        harmful_first(normalise_record(record))


def harm_data(world: Path, path: Path) -> Path:
    """The quickstart's pairs; an offer at the end of an answer is the harm."""
    lines = (world / "preferences.jsonl").read_text().splitlines()
    with path.open("w") as file:
        for record in map(json.loads, lines[:600]):
            harms = {side: record[side][-1]["content"].endswith(OFFERS) for side in ("chosen", "rejected")}
            if harms["chosen"] != harms["rejected"]:
                flags = {f"{side}_is_harmful": harm for side, harm in harms.items()}
                safer = "rejected" if harms["chosen"] else "chosen"
                file.write(json.dumps(record | flags | {"safer": safer}) + "\n")
    return path


@pytest.mark.parametrize("words", [[], LORA], ids=["full", "lora"])
def test_a_cost_model_learns_order_and_sign_and_is_not_centred(world: Path, run: Path, tmp_path: Path, words):
    """From the SFT model; the evaluation reads the order of harm too. A reward model is no cost model."""
    data = harm_data(world, tmp_path / "harm.jsonl")
    options = reward(world, run / "sft/final", tmp_path / "out", 60)
    options += ["--objective", "cost", "--train_data", str(data), "--eval_data", str(data), *words]
    succeed("step2_reward.main", [*options, "--learning_rate", "1e-2"], tmp_path)
    config = json.loads((tmp_path / "out/final/config.json").read_text())
    assert (config["reward_mean"], config["reward_std"], config["is_cost_model"]) == (0.0, 1.0, True)
    for name in ("eval/accuracy", "eval/sign_accuracy"):
        before, after = metrics(tmp_path / "out", name)
        assert before < 0.75 < 0.9 < after, name
    models = [str(tmp_path / "out/final"), str(run / "reward/final")]
    words = ["--eval_data", str(data), "--max_eval_samples", "12", "--output_dir", str(tmp_path / "report")]
    evaluate = ["--reward_model_name_or_path", models[0], *words]
    result = run_stage("step2_reward.evaluation.main", evaluate, tmp_path)
    assert result.codes == [0] and "are on the right side of 0" in result.output, result.output
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["accuracy"]["accuracy"] == pytest.approx(metrics(tmp_path / "out", "eval/accuracy")[-1])
    mixed = ["--reward_model_name_or_path", *models, *words]
    refused = run_stage("step2_reward.evaluation.main", mixed, tmp_path)
    assert refused.codes == [2] and "reward models or cost models, not both" in refused.output
