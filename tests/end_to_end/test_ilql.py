"""ILQL: from scored responses through the launch script to best of n, the comparison and the chat."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import REPOSITORY
from tests.end_to_end.test_launch import bash
from tests.end_to_end.test_process import refusal
from tests.end_to_end.test_resume import STOPPED, assert_same_end, steps_of, zero_config
from tests.launch.chat.test_chat import RunChat, talk  # noqa: F401 - a fixture
from tests.ranks import start_stage, succeed
from tests.recomputed.tiny import write_models, write_records
from tests.stages import CLOSE, LORA, QLORA, ZERO, common, metrics, timeless

ILQL, BEST, COMPARE = "step2_reward.ilql.main", "step3_ppo.best_of_n.main", "step3_ppo.compare.main"
HEADS = "ilql/heads.safetensors"
FIGURES = ("loss", "q_loss", "v_loss", "cql_loss", "awac_loss", "q", "target_q", "value", "score_loss")
VOWELS = """
def vowels(prompts, responses, records):
    return [float(sum(map(text.count, "aeiou"))) for text in responses]
"""


def training(world: Path, output: Path, *words: str, steps: int = 3) -> list[str]:
    return [
        *common(output, steps), "--model_name_or_path", str(world / "model"), "--learning_rate", "1e-3",
        "--train_data", str(world / "scored.jsonl"), "--alpha", "0.2", "--steps_for_target_q_sync", "2",
        *words,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def scored(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world with responses scored by their length, and `out/` made by the launch script on two ranks."""
    folder = tmp_path_factory.mktemp("ilql")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    records = map(json.loads, (world / "preferences.jsonl").read_text().splitlines()[:60])
    rows = [
        {"prompt": one["prompt"], "response": one[side], "score": len(one[side][0]["content"]) / 50}
        for one in records
        for side in ("chosen", "rejected")
    ]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rules.py").write_text(VOWELS)
    words = training(folder, folder / "out", "--best_metric", "eval/score_loss", "--ilql_beta", "3")
    done = bash("step2_ilql.sh", words, folder, NUM_GPUS="2")
    assert done.returncode == 0, done.stdout
    assert "warning: --alpha 0.2: 1 moves take the target Q heads 20% of the way" in done.stdout
    return folder


def sampling(scored: Path, output: Path, *words: str) -> list[str]:
    return [
        "--model_name_or_path", str(scored / "out/final"), "--prompt_data", str(scored / "prompts.jsonl"),
        "--reward_function", f"{scored}/rules.py:vowels", "--output_dir", str(output), "--seed", "1",
        "--samples_per_prompt", "2", "--prompts_per_round", "12", "--max_response_length", "8",
        "--keep_truncated", *words,
    ]  # fmt: skip


def comparison(scored: Path, output: Path, *words: str) -> list[str]:
    return [
        "--model_name_or_path", str(scored / "model"), str(scored / "out/final"), "--output_dir", str(output),
        "--prompt_data", str(scored / "prompts.jsonl"), "--reward_function", f"{scored}/rules.py:vowels",
        "--max_response_length", "8", "--max_eval_samples", "12", *words,
    ]  # fmt: skip


def completions(folder: Path) -> list[str]:
    return [json.loads(line)["completion"] for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_final_is_a_plain_model_with_a_file_of_heads(scored: Path) -> None:
    for name in ("final", "best"):
        _, info = AutoModelForCausalLM.from_pretrained(scored / "out" / name, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert len(load_file(scored / "out" / name / HEADS)) == 20
    assert len(metrics(scored / "out", "eval/score_loss")) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--zero_config", str(ZERO / "zero3.json"), "--micro_batch_tokens", "200"],
        ["--zero_config", str(ZERO / "zero2.json"), "--gradient_checkpointing"],
    ],
    ids=["zero3", "zero2"],
)
def test_ranks_and_stages_change_no_number(scored: Path, tmp_path: Path, words: list[str]) -> None:
    succeed(ILQL, training(scored, tmp_path / "out", *words), tmp_path, ranks=2)
    for part, name in product(("train", "eval"), FIGURES):
        expected = metrics(scored / "out", f"{part}/{name}")
        assert metrics(tmp_path / "out", f"{part}/{name}") == pytest.approx(expected, **CLOSE)
    heads, expected = (load_file(folder / "out/final" / HEADS) for folder in (tmp_path, scored))
    for name, weight in heads.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-6)


def test_a_stopped_run_with_adapters_resumes_to_the_same_bytes(scored: Path, tmp_path: Path) -> None:
    check_resumed(scored, tmp_path, [*zero_config(tmp_path, 2), *LORA], ranks=2)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("stage", "adapters", "precision", "ranks"),
    [*product((0, 1, 2, 3), ([], LORA), ("fp32", "bf16"), (1, 2)), (2, QLORA, "bf16", 2)],
)
def test_a_stopped_run_resumes_to_the_same_bytes(
    scored: Path, tmp_path: Path, stage: int, adapters: list[str], precision: str, ranks: int
) -> None:
    if adapters is QLORA:
        pytest.importorskip("bitsandbytes", reason="needs common/model/requirements-qlora.txt")
    check_resumed(scored, tmp_path, [*zero_config(tmp_path, stage, precision), *adapters], ranks)


def check_resumed(scored: Path, folder: Path, words: list[str], ranks: int) -> None:
    """Stopped after a step between two moves of the target heads, and at one."""
    full, parts = folder / "full", folder / "parts"
    succeed(ILQL, training(scored, full, *words, steps=5), folder, ranks)
    for step in (1, 4):
        running = start_stage(ILQL, training(scored, parts, *words, steps=5), folder, ranks)
        running.wait_for(lambda step=step: (parts / "metrics.jsonl").exists() and step in steps_of(parts))
        os.kill(running.pids[-1], signal.SIGTERM)
        stopped = running.result()
        assert stopped.codes in ([STOPPED] * ranks, [0] * ranks), stopped.output
    succeed(ILQL, training(scored, parts, *words, steps=5), folder, ranks)
    assert_same_end(full, parts)
    assert (full / "final" / HEADS).exists()


def test_best_of_n_decodes_with_the_heads(scored: Path, tmp_path: Path) -> None:
    """By the saved weight; the same on two ranks at ZeRO 3; with 0 as without the heads."""
    alone = shutil.copytree(scored / "out/final", tmp_path / "alone")
    shutil.rmtree(alone / "ilql")
    three = [*zero_config(tmp_path, 3), "--gather_for_generation", "False"]
    for name, words, ranks in (
        ("saved", [], 1), ("given", ["--ilql_beta", "3", *three], 2), ("zero", ["--ilql_beta", "0"], 1),
        ("alone", ["--model_name_or_path", str(alone)], 1),
    ):  # fmt: skip
        succeed(BEST, sampling(scored, tmp_path / name, *words), tmp_path, ranks)
    assert completions(tmp_path / "saved") == completions(tmp_path / "given")
    assert completions(tmp_path / "zero") == completions(tmp_path / "alone")
    assert completions(tmp_path / "saved") != completions(tmp_path / "zero")


def test_comparison_decodes_with_the_heads(scored: Path, tmp_path: Path) -> None:
    """KL of the guided policy grows with the weight; a policy without heads stays as it is."""
    reports = []
    for beta in ("0", "30"):
        output = tmp_path / beta
        succeed(COMPARE, comparison(scored, output, "--ilql_beta", beta), tmp_path)
        reports.append(json.loads((output / "report.json").read_text())["policies"])
    (first, plain), (second, guided) = reports
    assert first["scores"] == second["scores"] and second["kl"]["mean"] == 0
    assert guided["kl"]["mean"] > plain["kl"]["mean"] + 0.5


def test_heads_that_cannot_be_used_are_one_line(scored: Path, tmp_path: Path) -> None:
    damaged, other = (shutil.copytree(scored / "out/final", tmp_path / name) for name in ("cut", "other"))
    (damaged / HEADS).write_bytes((damaged / HEADS).read_bytes()[:100])
    tensors = load_file(other / HEADS)
    tensors["target.0.down.weight"] = tensors["target.0.down.weight"][:, :-1].contiguous()
    save_file(tensors, other / HEADS, metadata={"ilql_beta": "1"})
    for path, message in ((damaged, "not heads of ILQL"), (other, "does not fit the model beside it")):
        words = sampling(scored, tmp_path / "out", "--model_name_or_path", str(path))
        assert f"{path / HEADS}: {message}" in refusal(BEST, words, tmp_path)


def test_the_chat_answers_with_the_heads(scored: Path, talk: RunChat, tmp_path: Path) -> None:  # noqa: F811
    alone = shutil.copytree(scored / "out/final", tmp_path / "alone")
    shutil.rmtree(alone / "ilql")
    greedy, guided = ["--temperature", "0"], scored / "out/final"
    with_heads, without = (talk(["Hello!"], [path], *greedy).replies for path in (guided, alone))
    assert talk(["Hello!"], [guided], *greedy, "--ilql_beta", "0").replies == without != with_heads


def test_a_larger_weight_of_q_raises_the_score(tmp_path: Path) -> None:
    """Random letters; the score is the number of `a` less that of `b`. More weight, more `a`."""
    draw, letters = random.Random(0), "abcdefghij"
    write_models(tmp_path)
    texts = ["".join(draw.choices(letters, k=11)) for _ in range(600)]
    write_records(tmp_path / "scored.jsonl", [
        {"prompt": text[:3], "response": text[3:], "score": text[3:].count("a") - text[3:].count("b")}
        for text in texts
    ])  # fmt: skip
    write_records(tmp_path / "prompts.jsonl", [{"prompt": text[:3]} for text in texts[:60]])
    (tmp_path / "rules.py").write_text(VOWELS.replace('sum(map(text.count, "aeiou"))', "text.count('a')"))
    succeed(ILQL, [
        *training(tmp_path, tmp_path / "out", "--alpha", "0.5", "--steps_for_target_q_sync", "1", steps=200),
        "--gamma", "1", "--learning_rate", "1e-2", "--global_batch_size", "32", "--micro_batch_size", "32",
        "--logging_steps", "50",
    ], tmp_path)  # fmt: skip
    assert metrics(tmp_path / "out", "eval/score_loss")[-1] < 0.5
    means = []
    for beta in ("0", "2", "6"):
        words = comparison(tmp_path, tmp_path / beta, "--ilql_beta", beta, "--eval_fraction", "0.9")
        succeed(COMPARE, [*words, "--max_eval_samples", "0"], tmp_path)
        report = json.loads((tmp_path / beta / "report.json").read_text())
        means.append(report["policies"][1]["scores"]["vowels"]["mean"])
    assert means[0] < 1.5 and means[0] + 0.5 < means[1] < means[2] - 0.5


def test_an_export_alone_writes_the_heads_of_the_checkpoint(scored: Path, tmp_path: Path) -> None:
    words = training(scored, tmp_path / "out", "--save_steps", "1")
    succeed(ILQL, words, tmp_path)
    before, heads = timeless(tmp_path / "out"), (tmp_path / "out/final" / HEADS).read_bytes()
    shutil.rmtree(tmp_path / "out/final")
    succeed(ILQL, [*words, "--export_only"], tmp_path)
    assert (tmp_path / "out/final" / HEADS).read_bytes() == heads and timeless(tmp_path / "out") == before


def test_responses_of_preferences_are_scored_by_a_function(tmp_path: Path) -> None:
    """From any folder, without the launch scripts' environment."""
    (tmp_path / "rules.py").write_text(VOWELS)
    pair = {"prompt": "Name a fruit.", "chosen": " Apple.", "rejected": " Sky."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    command = [sys.executable, str(REPOSITORY / "launch/recipes/scored_responses.py")]
    words = ["rules.py:vowels", "pairs.jsonl", "scored.jsonl"]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert rows == [
        {"prompt": "Name a fruit.", "response": " Apple.", "score": 1.0},
        {"prompt": "Name a fruit.", "response": " Sky.", "score": 0.0},
    ]
    done = subprocess.run([*command, *words[:2]], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.endswith("FILE.py:NAME PREFERENCES OUTPUT\n")
