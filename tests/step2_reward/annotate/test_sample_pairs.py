"""Sampled pairs: drawn from the given policies, and readable by the annotation page."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.data.records import fraction
from common.generation.generate import PolicyAnswer
from step2_reward.annotate.sample_pairs import pair_up
from step2_reward.pairs import read_pairs
from tests.end_to_end.test_bad_input import check_refusal
from tests.ranks import run_stage, start_stage, succeed


def words(world: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(world / "model"), "--prompt_data", str(world / "few.jsonl"),
        "--output_dir", str(output), "--max_response_length", "6", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def few(world: Path) -> Path:
    """Four prompts, one of them too long."""
    records = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()[:3]]
    records.append({"prompt": "Hello there " * 200})
    (world / "few.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return world


@pytest.fixture(scope="module")
def noise(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with a nearly uniform distribution."""
    folder = tmp_path_factory.mktemp("noise")
    shutil.copytree(few / "model", folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.model.embed_tokens.weight, 1e-6)
    model.save_pretrained(folder)
    return folder


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_pairs_of_one_policy_and_of_two(few: Path, noise: Path, tmp_path: Path) -> None:
    """Three responses make three pairs, on one rank and on two; two policies take turns."""
    first = words(few, tmp_path / "one", "--responses_per_prompt", "3")
    done = run_stage("step2_reward.annotate.sample_pairs", first, tmp_path)
    one = read(tmp_path / "one")
    prompts = [json.loads(line)["prompt"] for line in (few / "few.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in one[::3]] == prompts[:3] and len(one) == 9
    again = words(few, tmp_path / "two_ranks", "--responses_per_prompt", "3", "--generation_batch_size", "1")
    succeed("step2_reward.annotate.sample_pairs", again, tmp_path, ranks=2)
    assert read(tmp_path / "two_ranks") == one
    assert len(read_pairs([str(tmp_path / "one/pairs.jsonl")], [], False)) == 9
    flags = [record[f"response_{side}_ended"] for record in one for side in "ab"]
    assert f"{flags.count(False)} of 18 responses are truncated at --max_response_length 6" in done.output

    names = [str(few / "model"), str(noise)]
    both = words(few, tmp_path / "both", "--model_name_or_path", *names, "--responses_per_prompt", "3")
    succeed("step2_reward.annotate.sample_pairs", both, tmp_path)
    two = read(tmp_path / "both")
    made_by = [(names.index(record["model_a"]), names.index(record["model_b"])) for record in two[:3]]
    assert made_by == [(0, 1), (0, 0), (1, 0)]
    # Each draw has its own seed, so draws 1 and 3 of the first policy match those of the first run.
    alone = {(record["response_a"], record["response_b"]) for record in one[1::3]}
    assert {(record["response_a"], record["response_b"]) for record in two[1::3]} == alone


def test_resume_gives_the_same_bytes(few: Path, noise: Path, tmp_path: Path) -> None:
    """Stopped within a draw of each policy; the result matches an unbroken run."""
    names = [str(few / "model"), str(noise)]
    more = ["--prompt_data", str(few / "prompts.jsonl"), "--generation_batch_size", "2"]
    more += ["--model_name_or_path", *names, "--responses_per_prompt", "4"]
    succeed("step2_reward.annotate.sample_pairs", words(few, tmp_path / "alone", *more), tmp_path)
    stopped = words(few, tmp_path / "out", *more)
    done = {}
    for number in (1, 4):
        running = start_stage("step2_reward.annotate.sample_pairs", stopped, tmp_path)
        journal = tmp_path / f"out/responses_{number}.journal"
        running.wait_for(lambda file=journal: file.exists() and file.stat().st_size > 0)
        os.kill(running.pids[0], signal.SIGTERM)
        ended = running.result()
        assert ended.codes == [75] and "Run the same command to resume" in ended.output, ended.output
        assert not (tmp_path / "out/pairs.jsonl").exists()
        assert all(file.read_text().startswith(text) for file, text in done.items())
        done = {file: file.read_text() for file in (tmp_path / "out").glob("*.journal")}
    other = run_stage("step2_reward.annotate.sample_pairs", [*stopped, "--seed", "1"], tmp_path)
    assert other.codes == [2] and "holds a different run (--seed 0 -> 1)" in other.output
    succeed("step2_reward.annotate.sample_pairs", stopped, tmp_path, ranks=2)
    assert (tmp_path / "out/pairs.jsonl").read_bytes() == (tmp_path / "alone/pairs.jsonl").read_bytes()
    assert all(file.read_text().startswith(text) for file, text in done.items())


def test_each_round_has_its_own_prompts_and_responses(few: Path, tmp_path: Path) -> None:
    """Without those that training holds out. With all prompts, a second round draws other responses."""
    lines = list(dict.fromkeys((few / "prompts.jsonl").read_text().splitlines()))[:40]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    more = ["--prompt_data", str(tmp_path / "some.jsonl"), "--eval_fraction", "0.5"]
    rounds = {}
    for name, words_of_round in {
        "1": ["--prompts_per_round", "5"], "2": ["--prompts_per_round", "5", "--round", "2"],
        "all": [], "again": ["--round", "2"],
    }.items():  # fmt: skip
        given = words(few, tmp_path / name, *more, *words_of_round)
        succeed("step2_reward.annotate.sample_pairs", given, tmp_path)
        rounds[name] = read(tmp_path / name)
    prompts = {name: {json.dumps(one["prompt"]) for one in pairs} for name, pairs in rounds.items()}
    assert not prompts["1"] & prompts["2"] and len(prompts["1"]) == len(prompts["2"]) == 5
    trained = {text for text in (json.dumps(json.loads(line)["prompt"]) for line in lines)
               if fraction(json.loads(text), "") >= 0.5}  # fmt: skip
    assert prompts["all"] == prompts["again"] == trained and 10 < len(trained) < 30
    responses = [{one["response_a"] for one in rounds[name]} for name in ("all", "again")]
    assert len(responses[0] & responses[1]) < len(responses[0]) / 4


def test_near_zero_temperature_matches_greedy_decoding(few: Path, noise: Path, tmp_path: Path) -> None:
    """Greedy decoding by transformers. The second policy is noise: identical responses make no pairs."""
    cold = words(few, tmp_path / "out", "--temperature", "1e-5")
    alone = run_stage(
        "step2_reward.annotate.sample_pairs", [*cold, "--output_dir", str(tmp_path / "no")], tmp_path, 2
    )
    assert alone.codes == [2, 2] and "no pairs: the responses to each prompt are identical" in alone.output
    assert not (tmp_path / "no/pairs.jsonl").exists()
    both = [*cold, "--model_name_or_path", str(few / "model"), str(noise)]
    succeed("step2_reward.annotate.sample_pairs", both, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(few / "model")
    tokenizer = AutoTokenizer.from_pretrained(few / "model")
    for record in read(tmp_path / "out"):
        text = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        response = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        assert record["response_a_ended"] == (tokenizer.eos_token_id in response)
        assert record["response_a"] == tokenizer.decode(response, skip_special_tokens=True).strip()


def test_pair_up_drops_identical_and_empty_responses() -> None:
    names = ["m", "n", "m", "n"]
    answers = [
        PolicyAnswer(" yes", True),
        PolicyAnswer("yes", False),
        PolicyAnswer(" ", True),
        PolicyAnswer("no ", True),
    ]
    records = pair_up([{"role": "user", "content": "a"}], answers, names)
    assert [(p["response_a"], p["response_b"], p["model_a"], p["model_b"]) for p in records] == [
        ("yes", "no", "m", "n"),
        ("yes", "no", "n", "n"),
    ]
    assert [(p["response_a_ended"], p["response_b_ended"]) for p in records] == [(True, True), (False, True)]
    verbatim = pair_up("a", [PolicyAnswer(" yes", True), PolicyAnswer(" no", True)], names[:2])
    assert [p["response_a"] for p in verbatim] == [" yes"]


@pytest.mark.end_to_end
def test_bad_input_is_one_line(few: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "pairs.jsonl").write_text("")
    lines = (few / "prompts.jsonl").read_text().splitlines()
    held_out = next(line for line in lines if fraction(json.loads(line)["prompt"], "") < 0.5)
    (tmp_path / "held_out.jsonl").write_text(held_out)
    model, damaged = str(few / "model"), tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = load_file(damaged / "model.safetensors")
    weights[min(weights)][..., 0] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    for more, parts in (
        ([], ["holds pairs.jsonl already"]),
        (["--output_dir", str(tmp_path / "new"), "--model_name_or_path", *[model] * 3], ["one model or two"]),
        (["--output_dir", str(tmp_path / "new"), "--max_prompt_length", "1"], ["few.jsonl", "no rows left"]),
        (["--output_dir", str(tmp_path / "new"), "--responses_per_prompt", "1"], ["at least 2"]),
        (
            [
                *("--output_dir", str(tmp_path / "new"), "--eval_fraction", "0.5"),
                *("--prompt_data", str(tmp_path / "held_out.jsonl")),
            ],
            ["leaves out all 1 prompts"],
        ),
        (["--output_dir", str(tmp_path / "new"), "--max_response_length", "256"], ["256 positions"]),
        (["--output_dir", str(tmp_path / "new"), "--model_name_or_path", str(damaged)], ["holds NaN"]),
    ):
        check_refusal(
            "step2_reward.annotate.sample_pairs", words(few, output, *more), parts, tmp_path, output
        )
    assert not (tmp_path / "new").exists()
