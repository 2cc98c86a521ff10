"""The three stages end to end: transformers and the next stage read the output of each stage."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from common.model import head
from common.model.loading import load_config
from tests.ranks import run_stage, succeed
from tests.stages import CLOSE, LORA, ZERO, metrics, ppo, reward, sft, timeless

# --- exported folders ---------------------------------------------------------------------------------------


def test_transformers_reproduces_the_loss_of_the_policy(world: Path, run: Path) -> None:
    """The held-out loss computed by transformers from final/ equals that of the run."""
    output = run / "again"
    held_out = (world / "demonstrations.jsonl").read_text().splitlines()[:6]
    (run / "held_out.jsonl").write_text("\n".join(held_out))
    succeed("step1_sft.main", [*sft(world, output, steps=2), "--eval_data", str(run / "held_out.jsonl")], run)
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    total = count = 0.0
    for line in held_out:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(full, return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, : len(tokenizer(prompt).input_ids)] = -100
        learnt = int((labels != -100).sum())
        total, count = total + model(ids, labels=labels).loss.item() * learnt, count + learnt
    assert metrics(output, "eval/loss")[-1] == pytest.approx(total / count, **CLOSE)


def test_transformers_reproduces_the_scores_of_the_reward_model(world: Path, run: Path) -> None:
    """Scores of the text-classification pipeline have the run's held-out mean, on either padding side."""
    rows = [json.loads(line) for line in (world / "preferences_heldout.jsonl").read_text().splitlines()[:12]]
    tokenizer = AutoTokenizer.from_pretrained(run / "reward/final")
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) for row in rows]
    expected = metrics(run / "reward", "eval/chosen_mean")[-1]
    for side in ("left", "right"):
        classify = pipeline("text-classification", str(run / "reward/final"), tokenizer=tokenizer)
        classify.tokenizer.padding_side = side
        result = classify(texts, function_to_apply="none", batch_size=4)
        assert sum(row["score"] for row in result) / len(result) == pytest.approx(expected, **CLOSE)


def test_scores_of_chosen_responses_are_centred(run: Path) -> None:
    config = AutoModelForSequenceClassification.from_pretrained(run / "reward/final").config
    assert math.isfinite(config.reward_mean) and config.reward_std > 0
    # step 3 reads the centred scores: an untrained policy's answers score near, not far, from the
    # demonstrations'
    assert abs(metrics(run / "ppo", "reward/mean")[0]) < 10


def test_every_final_folder_can_generate(run: Path, lora_run: Path) -> None:
    for folder in (run / "sft", run / "ppo", lora_run / "sft", lora_run / "ppo"):
        tokenizer = AutoTokenizer.from_pretrained(folder / "final")
        model = AutoModelForCausalLM.from_pretrained(folder / "final")
        batch = tokenizer("Hello! ", return_tensors="pt", return_token_type_ids=False)
        assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] > batch.input_ids.shape[1]
        assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_merged_and_adapter_are_the_same_model(world: Path, run: Path, lora_run: Path) -> None:
    """final/ is the base with final/adapter/ merged in, for a policy and for a reward model with its head."""
    from peft import PeftModel

    ids = torch.arange(4, 20)[None]
    for stage, auto, base, options in (
        ("sft", AutoModelForCausalLM, world / "model", {}),
        ("reward", AutoModelForSequenceClassification, run / "sft/final", {"num_labels": 1}),
    ):
        merged = auto.from_pretrained(lora_run / stage / "final")
        adapted = PeftModel.from_pretrained(
            auto.from_pretrained(base, **options), lora_run / stage / "final/adapter"
        )
        plain = auto.from_pretrained(base, **options)
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)


# --- numbers that must hold ---------------------------------------------------------------------------------


def test_ratio_is_one_and_kl_is_zero_at_the_start(run: Path, lora_run: Path) -> None:
    for folder in (run, lora_run):
        assert metrics(folder / "ppo", "policy/ratio") == pytest.approx([1.0] * 5, abs=1e-5)
        assert metrics(folder / "ppo", "kl/mean")[0] == pytest.approx(0.0, abs=1e-5)
        assert abs(metrics(folder / "ppo", "kl/mean")[-1]) > 1e-3


def test_tokenizer_that_is_larger_than_the_model(world: Path, tmp_path: Path) -> None:
    """The vocabulary grows to a multiple of 64, also at ZeRO 3: same losses; new rows are exported."""
    shutil.copytree(world, tmp_path / "world")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new1|>", "<|new2|>"]})
    tokenizer.save_pretrained(tmp_path / "world/model")
    losses = []
    for stage, ranks in ((0, 1), (3, 2)):
        start = tmp_path / f"sft{stage}"
        extra = ["--zero_config", str(ZERO / f"zero{stage}.json")]
        succeed("step1_sft.main", [*sft(tmp_path / "world", start, 2), *extra], tmp_path, ranks)
        output = tmp_path / f"reward{stage}"
        succeed("step2_reward.main", [*reward(world, start / "final", output, 2), *extra], tmp_path, ranks)
        weights = load_file(start / "final/model.safetensors")["model.embed_tokens.weight"]
        assert len(tokenizer) == 834 and len(weights) == 896 and weights[832:834].any(1).all()
        losses.append([*metrics(start, "train/loss"), *metrics(output, "train/loss")])
    assert losses[1] == pytest.approx(losses[0], **CLOSE)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_like_one(
    world: Path, run: Path, lora_run: Path, tmp_path: Path, stage: int, adapters: bool
) -> None:
    """Losses of all stages on two ranks under every ZeRO stage equal those of one rank without ZeRO."""
    expected = lora_run if adapters else run
    extra = ["--zero_config", str(ZERO / f"zero{stage}.json"), *(LORA if adapters else [])]
    start = run / "sft/final", run / "reward/final"
    succeed("step1_sft.main", [*sft(world, tmp_path / "sft"), *extra], tmp_path, ranks=2)
    succeed("step2_reward.main", [*reward(world, start[0], tmp_path / "reward"), *extra], tmp_path, ranks=2)
    succeed("step3_ppo.main", [*ppo(world, *start, tmp_path / "ppo"), *extra], tmp_path, ranks=2)
    for output, names in {
        "sft": ["train/loss", "train/grad_norm", "eval/loss"],
        "reward": ["train/loss", "train/grad_norm", "eval/loss", "eval/accuracy"],
        "ppo": ["reward/mean", "kl/mean", "policy/loss", "value/loss", "policy/grad_norm", "eval/score"],
    }.items():
        for name in names:
            result, wanted = metrics(tmp_path / output, name), metrics(expected / output, name)
            assert result == pytest.approx(wanted, **CLOSE), f"{output} {name}"


@pytest.mark.rare
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_eight_ranks_train_like_one(world: Path, run: Path, tmp_path: Path, stage: int) -> None:
    """One iteration of step 3; a rank has one row of each minibatch."""
    start = run / "sft/final", run / "reward/final"
    short = ["--micro_batch_size", "1", "--max_response_length", "4", "--max_eval_samples", "8"]
    for ranks, zero in ((8, stage), (1, 0)):
        words = [*ppo(world, *start, tmp_path / f"{ranks}", 1), *short]
        succeed("step3_ppo.main", [*words, "--zero_config", str(ZERO / f"zero{zero}.json")], tmp_path, ranks)
    for name in ("reward/mean", "kl/mean", "policy/loss", "value/loss", "policy/grad_norm", "eval/score"):
        eight, one = (metrics(tmp_path / f"{ranks}", name) for ranks in (8, 1))
        assert eight == pytest.approx(one, **CLOSE), name


def test_head_in_chunks(world: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 tokens under ZeRO-3, on two ranks with different numbers of chunks."""
    start = run / "sft/final", run / "reward/final"
    monkeypatch.setattr(head, "CHUNK", 5 * load_config(str(start[0])).vocab_size)
    extra = ["--zero_config", str(ZERO / "zero3.json")]
    succeed("step1_sft.main", [*sft(world, tmp_path / "sft"), *extra], tmp_path, ranks=2)
    succeed("step3_ppo.main", [*ppo(world, *start, tmp_path / "ppo"), *extra], tmp_path, ranks=2)
    for output, names in {
        "sft": ["train/loss", "train/grad_norm", "eval/loss"],
        "ppo": ["kl/mean", "policy/loss", "policy/entropy", "policy/grad_norm", "eval/score"],
    }.items():
        for name in names:
            result, wanted = metrics(tmp_path / output, name), metrics(run / output, name)
            assert result == pytest.approx(wanted, **CLOSE), f"{output} {name}"


def test_deterministic_run_is_the_same(world: Path, run: Path, tmp_path: Path) -> None:
    """Kernels are the same on a CPU. torch refuses none that training uses."""
    start = run / "sft/final", run / "reward/final"
    succeed("step3_ppo.main", [*ppo(world, *start, tmp_path / "ppo"), "--deterministic"], tmp_path)
    assert timeless(tmp_path / "ppo") == timeless(run / "ppo")


def test_generation_without_gathering(world: Path, run: Path, tmp_path: Path) -> None:
    """ZeRO-3 with its hooks, and with responses of different lengths on the ranks."""
    start = run / "sft/final", run / "reward/final"
    extra = ["--zero_config", str(ZERO / "zero3.json"), "--no_gather_for_generation"]
    succeed("step1_sft.main", [*sft(world, tmp_path / "sft", 1), *extra], tmp_path, ranks=2)
    succeed("step3_ppo.main", [*ppo(world, *start, tmp_path / "ppo"), *extra], tmp_path, ranks=2)
    for name in ("reward/mean", "response/length", "policy/loss"):
        assert metrics(tmp_path / "ppo", name) == pytest.approx(metrics(run / "ppo", name), **CLOSE)


@pytest.mark.rare
def test_copies_of_the_weights_on_nodes_of_two_ranks_change_nothing(
    world: Path, run: Path, tmp_path: Path
) -> None:
    """All four models are gathered from them. Updates make the copies of trained weights invalid."""
    config = json.loads((ZERO / "zero3_nodes.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "zero.json").write_text(json.dumps(config))
    extra = ["--zero_config", str(tmp_path / "zero.json"), "--no_gather_for_generation"]
    options = [*ppo(world, run / "sft/final", run / "reward/final", tmp_path / "ppo"), *extra]
    succeed("step3_ppo.main", options, tmp_path, ranks=4)
    for name in ("reward/mean", "kl/mean", "policy/loss", "value/loss", "policy/grad_norm", "eval/score"):
        expected = metrics(run / "ppo", name)
        assert metrics(tmp_path / "ppo", name) == pytest.approx(expected, **CLOSE), name


def test_gradients_sent_to_their_owners_change_nothing(world: Path, run: Path, tmp_path: Path) -> None:
    options = [*sft(world, tmp_path / "sft"), "--zero_config", str(ZERO / "zero1_nodes.json")]
    succeed("step1_sft.main", options, tmp_path, ranks=2)
    for name in ("train/loss", "train/grad_norm"):
        assert metrics(tmp_path / "sft", name) == pytest.approx(metrics(run / "sft", name), **CLOSE)


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offload_changes_nothing(world: Path, run: Path, tmp_path: Path, name: str) -> None:
    options = [*sft(world, tmp_path / "sft"), "--zero_config", str(ZERO / f"{name}.json")]
    succeed("step1_sft.main", options, tmp_path)
    assert metrics(tmp_path / "sft", "train/loss") == pytest.approx(
        metrics(run / "sft", "train/loss"), **CLOSE
    )


def test_micro_batches_and_checkpointing_change_nothing(world: Path, run: Path, tmp_path: Path) -> None:
    start = run / "sft/final", run / "reward/final"
    other = ["--micro_batch_size", "8", "--gradient_checkpointing"]
    succeed("step1_sft.main", [*sft(world, tmp_path / "sft"), *other], tmp_path)
    succeed("step2_reward.main", [*reward(world, start[0], tmp_path / "reward"), *other], tmp_path)
    generation = ["--generation_batch_size", "3"]
    succeed("step3_ppo.main", [*ppo(world, *start, tmp_path / "ppo"), *other, *generation], tmp_path)
    for output, name in (
        ("sft", "train/loss"),
        ("reward", "train/loss"),
        ("ppo", "policy/loss"),
        ("ppo", "value/loss"),
    ):
        assert metrics(tmp_path / output, name) == pytest.approx(
            metrics(run / output, name), rel=1e-5, abs=1e-6
        )


def test_rankings_train_the_same_with_and_without_shared_prompts(
    world: Path, run: Path, tmp_path: Path
) -> None:
    """Two, three and four responses to a prompt, with ties, on one rank and on two."""
    for name in ("preferences", "preferences_heldout"):
        records = [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number, record in enumerate(records):
                others = [records[number - i - 1]["rejected"] for i in range(number % 3)]
                responses = [*others, record["rejected"], record["chosen"]]
                ranks = [3, 3, 2][: len(others)] + [2, 1]
                file.write(
                    json.dumps({"prompt": record["prompt"], "responses": responses, "ranks": ranks}) + "\n"
                )
    options = reward(tmp_path, run / "sft/final", tmp_path / "alone", steps=3)
    language = ["--lm_loss_coef", "0.1"]
    succeed("step2_reward.main", [*options, *language, "--share_prompts", "no"], tmp_path)
    for stage in (0, 3):
        output = tmp_path / f"shared{stage}"
        extra = ["--zero_config", str(ZERO / f"zero{stage}.json"), "--gradient_checkpointing", *language]
        options = reward(tmp_path, run / "sft/final", output, steps=3)
        result = run_stage(
            "step2_reward.main", [*options, *extra, "--share_prompts", "yes"], tmp_path, ranks=2
        )
        assert result.codes == [0, 0] and "once for all its responses" in result.output, result.output
        for name in ("train/loss", "train/accuracy", "train/grad_norm", "train/lm_loss", "eval/loss"):
            result, wanted = metrics(output, name), metrics(tmp_path / "alone", name)
            assert result == pytest.approx(wanted, **CLOSE), f"ZeRO {stage} {name}"


def test_bf16_runs_on_the_cpu(world: Path, run: Path, tmp_path: Path) -> None:
    config = json.loads((ZERO / "zero1.json").read_text()) | {"bf16": {"enabled": True}}
    (tmp_path / "bf16.json").write_text(json.dumps(config))
    start = run / "sft/final", run / "reward/final"
    extra = ["--zero_config", str(tmp_path / "bf16.json")]
    succeed("step3_ppo.main", [*ppo(world, *start, tmp_path / "ppo"), *extra], tmp_path)
    assert metrics(tmp_path / "ppo", "policy/ratio") == pytest.approx([1.0] * 5, abs=1e-2)
    assert metrics(tmp_path / "ppo", "kl/mean")[0] == 0.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ppo/final").dtype == torch.bfloat16


# --- resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "zero", "extra"),
    [(1, "zero0", []), (2, "zero2", []), pytest.param(2, "zero3", LORA, marks=pytest.mark.rare)],
    ids=str,
)
def test_resumed_run_equals_an_uninterrupted_one(
    world: Path, run: Path, tmp_path: Path, ranks: int, zero: str, extra: list[str]
) -> None:
    """Killed in step 4 of 4: the same bytes in final/ and the same metrics lines, times aside."""
    start = run / "sft/final", run / "reward/final"
    constant = [
        "--lr_scheduler_type",
        "constant",
        "--save_steps",
        "2",
        "--zero_config",
        str(ZERO / f"{zero}.json"),
    ]
    for module, make in (
        ("step1_sft.main", lambda output, steps: sft(world, output, steps)),
        ("step2_reward.main", lambda output, steps: reward(world, start[0], output, steps)),
        ("step3_ppo.main", lambda output, steps: ppo(world, *start, output, steps)),
    ):
        full, parts = tmp_path / f"{module}.full", tmp_path / f"{module}.parts"
        succeed(module, [*make(full, 4), *constant, *extra], tmp_path, ranks)
        succeed(module, [*make(parts, 4), *constant, *extra], tmp_path, ranks)
        # Back to the state after step 2, as if the run had been killed in step 4.
        shutil.rmtree(parts / "checkpoints/step_000004")
        shutil.rmtree(parts / "final")
        succeed(module, [*make(parts, 4), *constant, *extra], tmp_path, ranks)
        for file in sorted(full.glob("final*/*.safetensors")):
            assert file.read_bytes() == (parts / file.relative_to(full)).read_bytes(), file
        assert timeless(full) == timeless(parts)


def test_a_different_run_is_not_overwritten(world: Path, run: Path) -> None:
    before = (run / "sft/metrics.jsonl").read_text()
    result = run_stage("step1_sft.main", [*sft(world, run / "sft"), "--seed", "7"], run)
    assert result.codes == [2]
    assert "--seed 0 -> 7" in result.output
    assert (run / "sft/metrics.jsonl").read_text() == before


# --- unlike tokenizers --------------------------------------------------------------------------------------


def test_reward_model_with_its_own_tokenizer(world: Path, run: Path, tmp_path: Path) -> None:
    """The text is encoded again for the reward model, and the critic starts with a zero head."""
    other = tmp_path / "other"
    shutil.copytree(run / "reward/final", other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|user|>", "Q: ").replace(
        "<|assistant|>", " A: "
    )
    tokenizer.save_pretrained(other)
    options = ppo(world, run / "sft/final", other, tmp_path / "ppo")
    result = run_stage("step3_ppo.main", options, tmp_path)
    assert result.codes == [0], result.output
    assert "critic: starts from the SFT model with a zero head" in result.output
    assert metrics(tmp_path / "ppo", "value/mean")[0] == 0.0
    assert metrics(tmp_path / "ppo", "reward/mean")[0] != pytest.approx(
        metrics(run / "ppo", "reward/mean")[0], abs=1e-3
    )
