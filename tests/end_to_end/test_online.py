"""Online RLHF through its script: rounds, files, the accuracy that shows the shift, kills, refusals."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.data.records import fraction
from launch.lib.free_port import free_port
from tests.chaos import wait_until_gone
from tests.end_to_end.test_launch import LAUNCH, bash
from tests.step2_reward.annotate.test_annotate import Rater

WORDS = ["--max_response_length", "8", "--generation_batch_size", "16"]
RULES = """
def letters(prompts, responses, records):
    return [sum(map(str.isalpha, response)) for response in responses]
"""
STEPS = "--max_steps 2 --global_batch_size 8 --micro_batch_size 8"


def variables(world: Path, run: Path, output: Path, **more: str) -> dict[str, str]:
    """Two rounds of 24 prompts, with two steps of each model; the response with more letters is better."""
    (world / "online_rules.py").write_text(RULES)
    return {
        "MODEL": str(run / "sft/final"), "PROMPTS": str(world / "prompts.jsonl"), "OUTPUT": str(output),
        "ROUNDS": "2", "NUM_GPUS": "1", "LABELS": "gold", "METHOD": "dpo",
        "GOLD": f"{world}/online_rules.py:letters", "EVALUATE_OPTIONS": "--max_eval_samples 8",
        "SAMPLE_OPTIONS": "--prompts_per_round 24 --temperature 0.5",
        "STEP2_OPTIONS": f"{STEPS} --learning_rate 1e-2", "DIRECT_OPTIONS": f"{STEPS} --learning_rate 1e-3",
        "STEP3_OPTIONS": f"{STEPS} --rollout_batch_size 8 --actor_learning_rate 1e-3 --save_steps 1",
        **more,
    }  # fmt: skip


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def accuracy(reward_model: Path, pairs: list[dict[str, Any]]) -> float:
    """Share of pairs that the model of transformers ranks as labelled, one response at a time."""
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    right = 0
    for pair in pairs:
        scores = []
        for side in "ab":
            reply = [{"role": "assistant", "content": pair[f"response_{side}"]}]
            text = tokenizer.apply_chat_template([*pair["prompt"], *reply], tokenize=False)
            scores.append(model(**tokenizer(text, return_tensors="pt")).logits.item())
        right += (scores[0] > scores[1]) == (pair["preference"] == "A")
    return right / len(pairs)


def test_two_rounds_of_dpo(world: Path, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = bash("online.sh", WORDS, tmp_path, **variables(world, run, output))
    assert done.returncode == 0, done.stdout

    # Each round samples from the newest policy, from other prompts that nobody holds out.
    labelled = [records(output / f"round_{n}/labels/preferences.jsonl") for n in (1, 2)]
    starts = [str(run / "sft/final"), f"{output}/round_1/policy/final"]
    prompts = [{json.dumps(pair["prompt"]) for pair in pairs} for pairs in labelled]
    assert [{pair["model_a"] for pair in pairs} for pairs in labelled] == [{start} for start in starts]
    assert not prompts[0] & prompts[1]
    assert all(fraction(json.loads(prompt), "") >= 0.1 for prompt in prompts[0] | prompts[1])
    for pair in labelled[0] + labelled[1]:
        a, b = (sum(map(str.isalpha, pair[f"response_{side}"])) for side in "ab")
        assert a != b and pair["preference"] == ("A" if a > b else "B")

    # Both models start from MODEL, and the second round trains on the pairs of both.
    files = [f"{output}/round_{n}/labels/preferences.jsonl" for n in (1, 2)]
    for stage in ("step2_reward", "policy"):
        given = [json.loads((output / f"round_{n}" / stage / "options.json").read_text()) for n in (1, 2)]
        assert [one["train_data"] for one in given] == [files[:1], files]
        assert [one["model_name_or_path"] for one in given] == [starts[0]] * 2
    assert (output / "final").resolve() == (output / "round_2/policy/final").resolve()
    AutoModelForCausalLM.from_pretrained(output / "final")

    # The first reward model is right about the pairs of the second round in this share of cases.
    rounds = records(output / "rounds.jsonl")
    expected = accuracy(output / "round_1/step2_reward/final", labelled[1])
    assert rounds[2]["former_accuracy"] == pytest.approx(expected, abs=1e-9)
    assert [one["pairs"] for one in rounds] == [None, *map(len, labelled)] and min(map(len, labelled)) > 5
    policies = json.loads((output / "report/report.json").read_text())["policies"]
    assert [one["model"] for one in policies] == [*starts, f"{output}/round_2/policy/final"]
    assert [one["gold"] for one in rounds] == [one["scores"]["gold score"]["mean"] for one in policies]
    assert rounds[0]["kl"] == 0 < abs(rounds[2]["kl"])


@pytest.mark.rare
def test_pairs_are_judged_and_mixed_with_older_ones(world: Path, run: Path, tmp_path: Path) -> None:
    """One round, with the SFT model as the judge; a second start of the same command labels nothing again."""
    older = tmp_path / "older.jsonl"
    older.write_text("\n".join((world / "preferences.jsonl").read_text().splitlines()[:40]))
    given = variables(
        world, run, tmp_path / "out", ROUNDS="1", LABELS="judge", JUDGE=str(run / "sft/final"),
        PREFERENCES=str(older), LABEL_OPTIONS="--max_length 250", GOLD="",
    )  # fmt: skip
    done = bash("online.sh", WORDS, tmp_path, **given)
    assert done.returncode == 0, done.stdout
    here = tmp_path / "out/round_1"
    pairs, labels = (records(here / name) for name in ("pairs/pairs.jsonl", "labels/preferences.jsonl"))
    assert [one["response_b"] for one in labels] == [one["response_b"] for one in pairs]
    assert all(0 < one["preference"] < 1 for one in labels)
    trained = json.loads((here / "policy/options.json").read_text())["train_data"]
    assert trained == [str(older), str(here / "labels/preferences.jsonl")]
    again = bash("online.sh", WORDS, tmp_path, **given)
    assert again.returncode == 0 and "pairs judged" in done.stdout and "pairs judged" not in again.stdout


@pytest.mark.rare
def test_people_label_across_a_kill(world: Path, run: Path, tmp_path: Path) -> None:
    """The page of a round; the script is killed while it is open, and started again at the same address."""
    port = free_port()
    given = variables(
        world, run, tmp_path / "out", ROUNDS="1", LABELS="annotate", GOLD="",
        LABEL_OPTIONS=f"--port {port}",
    )  # fmt: skip
    script, labels = ["bash", str(LAUNCH / "online.sh"), *WORDS], tmp_path / "out/round_1/labels"
    chosen = {}
    for is_killed in (True, False):
        running = subprocess.Popen(script, env=os.environ | given, start_new_session=True)
        rater = rater_of(running, f"http://127.0.0.1:{port}/", labels / "preferences.token")
        state = rater.post("next")
        while (pair := state["pair"]) and not (is_killed and len(chosen) == 5):
            side = max("left", "right", key=lambda name: len(pair[name][0]["text"]))
            chosen[pair["prompt"][0]["text"]] = pair[side][0]["text"]
            state = rater.post("answer", click=f"{len(chosen)}", pair=pair["id"], side=side, strength=1)
        if is_killed:
            os.killpg(running.pid, signal.SIGKILL)
            wait_until_gone(running, tmp_path / "out")
    assert running.wait(timeout=600) == 0
    pairs = records(labels.parent / "pairs/pairs.jsonl")
    assert {one["prompt"][0]["content"] for one in pairs} == chosen.keys()
    for one in records(labels / "preferences.jsonl"):
        assert one[f"response_{one['votes'][0].lower()}"] == chosen.pop(one["prompt"][0]["content"])
    assert not chosen
    assert (tmp_path / "out/final/model.safetensors").is_file()


def rater_of(running: subprocess.Popen, address: str, token: Path) -> Rater:
    """A rater of the page of a running script, as soon as it has a token."""
    while not (token.is_file() and token.read_text()):
        assert running.poll() is None
        time.sleep(0.1)
    return Rater(f"{address}?token={token.read_text().strip()}", "ada")


@pytest.mark.rare
@pytest.mark.parametrize(("method", "rounds"), [("ppo", "1"), ("dpo", "2")])
def test_kills_change_no_byte(world: Path, run: Path, tmp_path: Path, method: str, rounds: str) -> None:
    """Killed with its processes at random moments; in the end the files are those of an undisturbed run."""
    given = {
        name: variables(world, run, tmp_path / name, METHOD=method, ROUNDS=rounds)
        for name in ("alone", "killed")
    }
    alone = bash("online.sh", WORDS, tmp_path, **given["alone"])
    assert alone.returncode == 0, alone.stdout
    dice, kills, script = random.Random(method), 0, ["bash", str(LAUNCH / "online.sh"), *WORDS]
    while True:
        log = (tmp_path / f"{kills}.log").open("w")
        running = subprocess.Popen(
            script, env=os.environ | given["killed"], start_new_session=True, stdout=log, stderr=log
        )
        try:
            assert running.wait(timeout=dice.uniform(15, 60 + 10 * kills)) == 0, Path(log.name).read_text()
            break
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            wait_until_gone(running, tmp_path / "killed")  # ranks end a moment after their launcher
            kills += 1
    assert kills >= 2
    names = ["rounds.jsonl", "final/model.safetensors"]
    for n in range(1, int(rounds) + 1):
        names += [f"round_{n}/{name}" for name in (
            "labels/preferences.jsonl", "step2_reward/final/model.safetensors",
            "policy/final/model.safetensors",
        )]  # fmt: skip
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"LABELS": "vote"}, "LABELS 'vote' must be one of: judge annotate gold"),
        ({"METHOD": "sft"}, "METHOD 'sft' must be one of: ppo dpo"),
        ({"GOLD": ""}, "online.sh needs the variable GOLD"),
        ({"LABELS": "judge"}, "online.sh needs the variable JUDGE"),
        ({"ROUNDS": "two"}, "ROUNDS two: must be a whole number"),
        ({"GOLD": "no.py:gold"}, "--gold_function no.py:gold: there is no file no.py"),
    ],
)  # fmt: skip
def test_wrong_variables_are_refused_before_sampling(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, more: dict[str, str], part: str
) -> None:
    files = tmp_path_factory.mktemp("files")
    done = bash("online.sh", WORDS, tmp_path, **variables(files, files, tmp_path / "out", **more))
    (line,) = done.stdout.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and part in line, done.stdout
    assert not list(tmp_path.iterdir())
