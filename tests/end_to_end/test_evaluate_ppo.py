"""Comparison of policies: metrics equal those of training, on any number of ranks."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.text.conversation import DEFAULT_CHAT_TEMPLATE
from tests.end_to_end.test_bad_input import check_refusal
from tests.end_to_end.test_launch import bash
from tests.ranks import succeed
from tests.stages import (
    ZERO,
    metrics,
    ppo,  # noqa: F401 - run and world are fixtures
)

FUNCTIONS = """
def by_length(prompts, responses, records):
    assert all("prompt" in record for record in records)
    return [len(text) / 10 for text in responses]

calls = 0

def drifts(prompts, responses, records):
    global calls
    calls += 1
    return [calls * 1e-6] * len(responses)

def broken(prompts, responses, records):
    raise KeyError("limit")
"""


def options(world: Path, run: Path, output: Path, *words: str) -> list[str]:
    """The policies before and after step 3, on 13 held-out prompts."""
    return [
        "--model_name_or_path", str(run / "sft/final"), str(run / "ppo/final"),
        "--reward_model_name_or_path", str(run / "reward/final"), "--output_dir", str(output),
        "--prompt_data", str(world / "prompts.jsonl"), "--max_eval_samples", "13",
        "--max_response_length", "8", *words,
    ]  # fmt: skip


def compare(words: list[str], output: Path) -> dict:
    succeed("step3_ppo.compare.main", words, output)
    return json.loads((output / "report.json").read_text())


def flat(report: Any, name: str = "") -> dict[str, float]:
    """The numbers of a report by their paths."""
    if isinstance(report, dict | list):
        items = report.items() if isinstance(report, dict) else enumerate(report)
        return {path: one for key, part in items for path, one in flat(part, f"{name}/{key}").items()}
    return {name: report} if isinstance(report, float | int) else {}


def test_metrics_equal_those_of_training(world: Path, run: Path, tmp_path: Path) -> None:
    """Both policies draw the responses of the evaluations of training, with the same metrics."""
    texts = ["--demonstration_data", str(world / "demonstrations.jsonl")]
    report = compare(options(world, run, tmp_path, "--max_eval_samples", "12", *texts), tmp_path)
    assert report["prompts"] == 12 and [one["n"] for one in report["best_of"]] == [1]
    for policy, index in zip(report["policies"], (0, -1), strict=True):
        assert policy["scores"]["reward model"]["mean"] == pytest.approx(
            metrics(run / "ppo", "eval/score")[index], rel=1e-4, abs=1e-5
        )
        assert policy["kl"]["mean"] == pytest.approx(metrics(run / "ppo", "eval/kl")[index], abs=1e-4)
        for name in ("length", "eos_rate", "distinct_2", "repeated_3"):
            assert policy[name] == pytest.approx(metrics(run / "ppo", f"eval/{name}")[index], abs=1e-6)
    before, after = report["policies"]
    assert before["perplexity"] == pytest.approx(metrics(run / "sft", "eval/perplexity")[-1], rel=1e-4)
    assert before["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0} and abs(after["kl"]["mean"]) > 1e-3
    against = after["against"][0]["reward model"]
    assert against["wins"] + against["ties"] + against["losses"] == 12


def test_two_ranks_equal_one(world: Path, run: Path, tmp_path: Path) -> None:
    """Two ranks have partitioned weights and uneven shares of 13 prompts and 13 demonstrations. Perplexity
    equals that of evaluate_sft.
    """
    rules, texts = tmp_path / "rules.py", tmp_path / "texts.jsonl"
    rules.write_text(FUNCTIONS)
    texts.write_text("\n".join((world / "demonstrations.jsonl").read_text().splitlines()[:13]))
    more = ["--reward_function", f"{rules}:by_length", "--gold_function", f"{rules}:by_length:2"]
    more += ["--eval_demonstration_data", str(texts), "--best_of", "4", "--generation_batch_size", "3"]
    more += ["--micro_batch_size", "3"]
    reports = []
    for ranks, zero in ((1, "zero0"), (2, "zero3")):
        output = tmp_path / zero
        words = [*options(world, run, output, *more), "--zero_config", str(ZERO / f"{zero}.json")]
        done = bash("evaluate_ppo.sh", words, tmp_path, NUM_GPUS=str(ranks))
        assert done.returncode == 0, done.stdout
        assert f"13 held-out prompts on {ranks} rank" in done.stdout
        assert "best of n by reward model" in done.stdout
        assert (output / "scores.png").read_bytes().startswith(b"\x89PNG")
        reports.append(flat(json.loads((output / "report.json").read_text())))
    one, two = reports
    assert one == pytest.approx(two, rel=1e-4, abs=2e-5)
    assert one["/best_of/2/n"] == 4 and one["/best_of/2/kl"] == pytest.approx(math.log(4) - 3 / 4)
    for path in ("/policies/1/scores/{}/mean", "/policies/1/scores/{}/low", "/best_of/1/scores/{}/high"):
        assert one[path.format("gold score")] == pytest.approx(2 * one[path.format("by_length")])
    proxy = [one[f"/best_of/{index}/scores/reward model/mean"] for index in range(3)]
    assert proxy == sorted(proxy) and proxy[0] < proxy[2]
    models = [str(run / "sft/final"), str(run / "ppo/final")]
    words = ["--model_name_or_path", *models, "--eval_data", str(texts)]
    succeed("step1_sft.evaluate", [*words, "--output", str(tmp_path / "texts.json")], tmp_path)
    for number, row in enumerate(json.loads((tmp_path / "texts.json").read_text())):
        assert one[f"/policies/{number}/perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)


def test_a_policy_ties_with_itself(world: Path, run: Path, tmp_path: Path) -> None:
    """With --eval_data, top-k and top-p, and a judge whose scores drift. A third policy is compared with
    both.
    """
    (tmp_path / "rules.py").write_text(FUNCTIONS)
    models = [str(run / name / "final") for name in ("ppo", "ppo", "sft")]
    words = ["--model_name_or_path", *models, "--top_p", "0.9", "--top_k", "20"]
    words += ["--eval_data", str(world / "prompts.jsonl"), "--gold_function", f"{tmp_path}/rules.py:drifts"]
    first, second, third = compare(options(world, run, tmp_path, *words), tmp_path)["policies"]
    tie = {"wins": 0, "ties": 13, "losses": 0, "win_rate": None, "at_equal_length": None}
    assert second.pop("against") == [{"reward model": tie, "gold score": tie}] and first.pop("against") == []
    one, other = third["against"]
    assert one == other and one["reward model"]["wins"] + one["reward model"]["losses"] > 0
    assert first == second and first["kl"]["mean"] == 0.0


def test_mistakes_are_one_line(world: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(FUNCTIONS)
    texts = world / "demonstrations.jsonl"
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    policy, other = str(run / "sft/final"), str(tmp_path / "other")
    shutil.copytree(policy, other)
    (Path(other) / "chat_template.jinja").write_text(DEFAULT_CHAT_TEMPLATE)
    for words, parts in (
        (["--model_name_or_path", policy, other], [other, f"not that of {policy}"]),
        (["--model_name_or_path", policy, str(tmp_path)], [str(tmp_path), "config.json is missing"]),
        (["--reward_model_name_or_path", policy], [policy, "not a reward model"]),
        (["--max_eval_samples", "1"], ["prompts.jsonl: 1 held-out prompts", "at least 2"]),
        (["--eval_data", str(tmp_path / "no.jsonl")], ["no.jsonl: No such file"]),
        (["--eval_demonstration_data", str(tmp_path / "bad.jsonl")], ["bad.jsonl:2", "'completion'"]),
        (["--eval_demonstration_data", str(texts), "--max_length", "8"], ["no rows left"]),
        (["--gold_function", f"{tmp_path}/rules.py:no"], ["--gold_function", "has no function no"]),
        (["--best_of", "-1"], ["--best_of -1", "at least 0"]),
        (["--max_response_length", "400"], ["--max_response_length 400", "256 positions"]),
        (["--reward_function", f"{tmp_path}/rules.py:broken"], ["broken: KeyError: 'limit'"]),
    ):
        given = options(world, run, tmp_path / "out", *words)
        check_refusal("step3_ppo.compare.main", given, parts, tmp_path, tmp_path / "out")
    given = options(world, run, tmp_path / "out")
    for name in ("--reward_model_name_or_path", "--prompt_data"):
        index = given.index(name)
        without = given[:index] + given[index + 2 :]
        check_refusal("step3_ppo.compare.main", without, ["required", name], tmp_path, tmp_path / "out")
