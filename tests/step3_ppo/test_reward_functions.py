"""User-defined reward functions: return values, failures, and resuming a run after a failure."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.runtime.options import UserError
from step3_ppo import reward_functions as module
from step3_ppo.reward_functions import function_scores, load_functions
from tests.end_to_end.test_resume import assert_same_end
from tests.ranks import run_stage, succeed
from tests.stages import ppo

RECORDS = [{"prompt": str(row)} for row in range(4)]


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore sys.path after each test."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def score(folder: Path, body: str, count: int = 4) -> list[float]:
    """Scores of `count` records by a function with this body."""
    file = folder / "one.py"
    head = "import asyncio, statistics, sys, time\nimport numpy as np, torch\n"
    file.write_text(f"{head}def f(prompts, responses, records):\n    {body}\n")
    (function,) = load_functions([f"{file}:f"], "reward_function")
    prompts = [record["prompt"] for record in RECORDS[:count]]
    (scores,) = function_scores([function], prompts, prompts, RECORDS[:count])
    return scores


@pytest.mark.parametrize(
    "body",
    [
        "return (float(p) for p in prompts)",
        "return np.arange(4)",
        "return torch.arange(4.0)",
        "return tuple(torch.arange(4.0)[:, None])",
        "return [False, np.float32(1), torch.tensor(2), 3]",
        "prompts.reverse(); return range(4)",
    ],
)
def test_numbers_of_every_kind(body, tmp_path):
    scores = score(tmp_path, body)
    assert scores == [0.0, 1.0, 2.0, 3.0] and {type(one) for one in scores} == {float}


HOLE = "{'2': {}}.get(r['prompt'], {'limit': float(r['prompt'])})['limit'] for r in records"
OF_SECOND = 'for record {"prompt": "2"}; it must be a finite number'
PROBLEMS = {
    f"x = [{HOLE}]; s = statistics.stdev(x); return x": 'KeyError: \'limit\'; record {"prompt": "2"}',
    f"statistics.stdev(map(float, prompts)); return [{HOLE}]": "KeyError: 'limit'; no single record of the 4",
    f"return ({HOLE})": 'KeyError: \'limit\'; record {"prompt": "2"}',
    "return (int('x' * (p == '2') or p) for p in prompts)": "ValueError: invalid literal for int()",
    "if len(records) > 1: raise OSError('slow\\n down')": "OSError: slow down; no single record of the 4",
    "sys.exit(0)": 'SystemExit: 0; record {"prompt": "0"}',
    "raise asyncio.CancelledError": "CancelledError; record",
    "return [None if p == '2' else 1 for p in prompts]": f"returned None {OF_SECOND}",
    "return ['1' if p == '2' else 1 for p in prompts]": f"returned '1' {OF_SECOND}",
    "return [10**400 if p == '2' else 1 for p in prompts]": OF_SECOND,
    "return [torch.ones(2) if p == '2' else 1 for p in prompts]": f"returned tensor([1., 1.]) {OF_SECOND}",
    "return [float('inf') if p == '2' else 1 for p in prompts]": f"returned inf {OF_SECOND}",
    "return '1234'": "must return a list of numbers, not '1234'",
    "return dict.fromkeys(range(4), 1.0)": "must return a list of numbers, not {",
    "return torch.ones(4).mean()": "must return a list of numbers, not tensor(1.)",
    "return [1.0]": "returned 1 scores for 4 responses",
}


@pytest.mark.parametrize("body", PROBLEMS)
def test_problem_is_one_line_with_the_record(body, tmp_path):
    with pytest.raises(UserError) as error:
        score(tmp_path, body)
    assert str(error.value).startswith("--reward_function f: ")
    assert PROBLEMS[body] in str(error.value) and "\n" not in str(error.value)


def test_weights(tmp_path):
    (tmp_path / "one.py").write_text("f = g = h = i = len")
    for text, weight in {"": 1, ":1e-3": 1e-3, ":2.": 2, ":-0.5": -0.5, ":0": 0}.items():
        assert load_functions([f"{tmp_path}/one.py:f{text}"], "reward_function")[0].weight == weight
    for text in (":nan", ":-inf", ":heavy", ":1,5"):
        with pytest.raises(UserError, match=f"finite number, not '{text[1:]}'"):
            load_functions([f"{tmp_path}/one.py:f{text}"], "reward_function")


def test_file_can_import_its_neighbours(tmp_path):
    """Two files of the same name do not collide, and a neighbour called `common` does not shadow ours."""
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.py").write_text(f"""
from __future__ import annotations
import dataclasses, common.runtime.options, neighbour_{name}

@dataclasses.dataclass
class Rule:
    value: dataclasses.InitVar[float] = 0.0

def {name}(prompts, responses, records):
    return [{number}.0 + neighbour_{name}.MORE] * len(responses)
""")
        (tmp_path / name / f"neighbour_{name}.py").write_text("MORE = 0.5")
        (tmp_path / name / "common.py").write_text("raise AssertionError")
    sources = [f"{tmp_path}/{name}/scores.py:{name}" for name in ("one", "two")]
    functions = load_functions(sources, "gold_function")
    assert function_scores(functions, RECORDS, ["a"] * 4, RECORDS) == [[0.5] * 4, [1.5] * 4]


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "1 / 0", "def"])
def test_failing_file_is_reported_each_time(line, tmp_path):
    (tmp_path / "one.py").write_text(line)
    for _ in range(2):
        with pytest.raises(UserError, match=r"one\.py: (SystemExit: 0|ZeroDivisionError|SyntaxError)"):
            load_functions([f"{tmp_path}/one.py:f"], "reward_function")


def test_blocking_function_is_reported_at_growing_intervals(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    assert score(tmp_path, "time.sleep(0.6); return [1.0] * 4") == [1.0] * 4
    start = "--reward_function f on rank 3, given 4 responses: has not returned after"
    expected = [f"{start} {seconds} s; waiting" for seconds in ("0.1", "0.2", "0.4")]
    assert capsys.readouterr().out.splitlines()[:3] == expected
    time.sleep(0.4)
    assert not capsys.readouterr().out


# --- a run whose function fails -----------------------------------------------------------------------------

FUNCTIONS = """
import os, random
calls = {"score": 0, "judge": 0}

def score(prompts, responses, records):
    fail("score", 3)
    return [random.random() + len(text) for text in responses]

def judge(prompts, responses, records):
    fail("judge", 3)
    return [-float(text.count("e")) for text in responses]

def fail(name, at):
    calls[name] += 1
    if name == BROKEN and calls[name] >= at and os.environ["RANK"] == "1":
        raise RuntimeError("no answer")
"""
# The reward function fails in step 3; the gold function in the evaluation after step 2, or after the last.
CASES = {"score": ["--eval_fraction", "0"], "judge": ["--eval_steps", "1"], "last": ["--eval_steps", "2"]}


def broken(name: str) -> str:
    return FUNCTIONS.replace("BROKEN", repr(name))


@pytest.fixture
def functions(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "my functions"
    folder.mkdir()
    (folder / "both.py").write_text(broken(""))
    return folder / "both.py"


@pytest.mark.parametrize("case", CASES)
def test_run_resumes_after_the_function_is_fixed(case, world, run, functions, tmp_path):
    """It writes the same bytes as a run without the failure; only the failed step is lost."""
    uninterrupted, parts = tmp_path / "uninterrupted", tmp_path / "parts"
    more = [*CASES[case], "--reward_function", f"{functions}:score:1e-1", "--ema_decay", "0.5"]
    more += ["--normalise_scores", "each", "--ptx_data", str(world / "demonstrations.jsonl")]
    if case != "score":
        more += ["--gold_function", f"{functions}:judge", "--best_metric", "eval/gold"]
    start = run / "sft/final", run / "reward/final"
    succeed("step3_ppo.main", [*ppo(world, *start, uninterrupted, 4), *more], tmp_path, 2)
    functions.write_text(broken("score" if case == "score" else "judge"))
    options = [*ppo(world, *start, parts, 4), *more]
    failed = run_stage("step3_ppo.main", options, tmp_path, 2)
    step = 4 if case == "last" else 2
    assert failed.codes == [2, 2], failed.output
    (line,) = [line for line in failed.output.splitlines() if line.startswith("error:")]
    title = "--reward_function score" if case == "score" else "--gold_function judge"
    assert f"{title}: RuntimeError: no answer; record {{" in line
    assert line.endswith(f"correct its file; then the same command resumes after step {step}")
    assert (parts / f"checkpoints/step_{step:06}/manifest.json").exists()

    functions.write_text(broken("") + "# fixed")
    resumed = run_stage("step3_ppo.main", options, tmp_path, 2)
    assert resumed.codes == [0, 0], resumed.output
    label = f"{functions}:score:1e-1 (--reward_function, file 1)"
    assert f"{label}: the file has changed since this run started" in resumed.output
    assert_same_end(uninterrupted, parts)
    if case != "score":
        for name in ("samples.jsonl", "best/model.safetensors"):
            assert (uninterrupted / name).read_bytes() == (parts / name).read_bytes()
    if case == "last":  # a completed evaluation is not repeated
        before = (parts / "metrics.jsonl").read_text()
        succeed("step3_ppo.main", options, tmp_path, 2)
        assert (parts / "metrics.jsonl").read_text() == before
        state = json.loads((parts / "checkpoints/step_000004/state.json").read_text())
        assert not state["unevaluated"]
