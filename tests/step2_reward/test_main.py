"""The responses whose mean score becomes 0."""

import json

from step2_reward.centring import load_centre_rows
from step2_reward.data import Preference
from step2_reward.options import RewardOptions
from tests.word_encoder import EOS, WordEncoder

TRAIN = [
    Preference([10], [11, EOS, 12, 13, EOS], [2, 3], [0.0, 1.0]),
    Preference([20, 21], [22, EOS, EOS, 23, EOS], [2, 1, 2], [0.0, 0.0, 1.0]),
]


def test_without_demonstrations_the_chosen_responses_are_used():
    assert load_centre_rows(RewardOptions(), WordEncoder(), TRAIN) == [[10, 11, EOS], [20, 21, 22, EOS]]


def test_all_demonstrations_are_used_also_with_eval_data(tmp_path):
    demonstrations, preferences = tmp_path / "demonstrations.jsonl", tmp_path / "preferences.jsonl"
    records = [{"prompt": f"a b {i}", "completion": "c"} for i in range(50)]
    demonstrations.write_text("".join(json.dumps(record) + "\n" for record in records))
    preferences.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    for eval_data in ([], [str(preferences)]):
        options = RewardOptions(demonstration_data=[str(demonstrations)], eval_data=eval_data)
        assert load_centre_rows(options, WordEncoder(), TRAIN) == [[10, 11, 12, 13, EOS]] * 50
