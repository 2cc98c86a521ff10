"""The table at the end of a recipe."""

import json
from pathlib import Path

import pytest

from launch.recipes.methods_table import main


def test_costs_of_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """PPO samples 4 responses of 10 and of 12 tokens; all thresholds of a round share its samples."""
    mean = {"mean": 0.5, "low": 0.4, "high": 0.6}
    policy = {"scores": {"gold score": mean}, "kl": mean, "distinct_2": 0.9, "perplexity": 4.5}
    written = {
        "report/report.json": {
            "policies": [policy | {"model": f"{tmp_path}/{m}/final"} for m in ("ppo", "rest")]
        },
        "ppo/options.json": {"rollout_batch_size": 4},
        "rest/round_1/above_0.5/step1_sft/options.json": {},
    }
    lines = {
        "ppo/metrics.jsonl": [{"step": 0, "eval/score": 1}, {"response/length": 10}, {"response/length": 12}],
        "rest/round_1/above_0.5/step1_sft/metrics.jsonl": [{"train/loss": 1.0}],
        "rest/round_1/samples/samples.jsonl": [{"length": 48}] * 1000,
    }
    texts = {name: json.dumps(result) for name, result in written.items()}
    texts |= {name: "\n".join(map(json.dumps, result)) for name, result in lines.items()}
    places = {
        "ppo": 100,
        "rest/round_1/samples": 20,
        "rest/round_1/above_0.5/step1_sft": 3,
        "rest/report": 50,
    }
    texts["times.txt"] = "\n".join([*(f"{n} {tmp_path / place}" for place, n in places.items()), "500 "])
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sys.argv", ["methods_table.py", str(tmp_path)])
    main()
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| ppo | 0.500 ± 0.100 | 0.50 | 0.900 | 4.50 | 100 | 88 |"
    assert rows[3] == "| rest | 0.500 ± 0.100 | 0.50 | 0.900 | 4.50 | 23 | 48,000 |"
