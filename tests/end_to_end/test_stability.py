"""Stability of step 3: KL, entropy, PPO-ptx, EMA, gold."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.ranks import run_stage, succeed
from tests.stages import (
    LORA,
    ZERO,
    metrics,
    ppo,
)

FUNCTIONS = """
def constant(prompts, responses, records):
    return [1.0] * len(responses)

def length(prompts, responses, records):
    return [float(len(text)) for text in responses]
"""
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def options(world: Path, run: Path, output: Path, *words: str, steps: int = 3) -> list[str]:
    """Later words override earlier ones."""
    return [*ppo(world, run / "sft/final", run / "reward/final", output, steps), *words]


MIXES = {
    "k2": [
        "--kl_penalty",
        "k2",
        "--entropy_coef",
        "0.01",
        "--top_k",
        "30",
        "--top_p",
        "0.9",
        "--temperature",
        "0.7",
    ],
    "dapo": [
        *("--advantage_estimator", "group", "--samples_per_prompt", "4", "--clip_range_high", "0.28"),
        *("--mask_truncated", "--overlong_buffer", "4", "--loss_aggregation", "sequence", *LORA),
    ],
    "gspo": ["--policy_loss", "gspo", "--loss_aggregation", "sequence", "--zero_config", "{zero2}"],
    "vapo": [
        *("--critic_gae_lambda", "1", "--length_adaptive_lambda", "0.5", "--zero_config", "{zero3}"),
        *("--entropy_low", "9", "--entropy_high", "10", "--entropy_coef_step", "0.01"),
    ],
    "cispo": ["--policy_loss", "cispo", "--clip_range", "1", "--clip_range_high", "4"],
    "ptx": ["--ptx_data", "{demonstrations}", "--ema_decay", "0.6", "--zero_config", "{zero2}"],
    "lora": [*LORA, "--ptx_data", "{demonstrations}", "--ema_decay", "0.6", "--max_update_kl", "1e-3"],
}


@pytest.mark.parametrize("name", MIXES)
def test_ranks_and_stops_change_nothing(name, world, run, tmp_path):
    """Two ranks equal one; a run in two parts ends with the same bytes."""
    demonstrations = world / "demonstrations.jsonl"
    words = [
        word.format(demonstrations=demonstrations, zero2=ZERO / "zero2.json", zero3=ZERO / "zero3.json")
        for word in MIXES[name]
    ]
    words += ["--lr_scheduler_type", "constant"]
    one, two, parts = (tmp_path / part for part in ("one", "two", "parts"))
    succeed("step3_ppo.main", options(world, run, one, *words), tmp_path)
    assert metrics(one, "policy/ratio") == pytest.approx([1.0] * 3, abs=1e-5)
    assert metrics(one, "kl/mean")[0] == pytest.approx(0, abs=1e-5)
    succeed("step3_ppo.main", options(world, run, two, *words), tmp_path, 2)
    for figure in ("reward/mean", "policy/approx_kl", "kl/mean", "policy/updates", "ptx/loss"):
        assert metrics(two, figure) == pytest.approx(metrics(one, figure), rel=1e-3, abs=1e-5)
    for steps in (1, 3):
        going_on = ["--max_steps", str(steps), "--save_steps", "1"]
        succeed("step3_ppo.main", options(world, run, parts, *words, *going_on), tmp_path)
    finals = ["final"] + ["final_ema"] * ("--ema_decay" in words)
    for folder in finals:
        assert (parts / folder / WEIGHTS).read_bytes() == (one / folder / WEIGHTS).read_bytes()
    if name == "lora":
        assert min(metrics(one, "policy/updates")) < 4, "two epochs of two updates, ended by --max_update_kl"


def test_ema_is_that_of_the_weights_after_each_iteration(world, run, tmp_path):
    words = ["--ema_decay", "0.7", "--lr_scheduler_type", "constant", "--eval_fraction", "0"]
    weights = []
    for steps in (1, 2, 3):
        succeed("step3_ppo.main", options(world, run, tmp_path / str(steps), *words, steps=steps), tmp_path)
        weights.append(load_file(tmp_path / str(steps) / "final" / WEIGHTS))
    result = load_file(tmp_path / "3/final_ema" / WEIGHTS)
    assert result.keys() == weights[0].keys()
    for name, tensor in result.items():
        expected = 0.49 * weights[0][name] + 0.21 * weights[1][name] + 0.3 * weights[2][name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "3/final_ema")


def test_critic_warmup_and_learning_rates(world, run, tmp_path):
    """Also when --max_update_kl ends every iteration after its first update."""
    words = [
        "--eval_fraction",
        "0",
        "--critic_warmup_steps",
        "2",
        "--ptx_data",
        str(world / "demonstrations.jsonl"),
    ]
    before = load_file(run / "sft/final" / WEIGHTS)
    for output, steps, more in (("warm", 2, []), ("full", 4, []), ("cut", 4, ["--max_update_kl", "1e-9"])):
        succeed(
            "step3_ppo.main", options(world, run, tmp_path / output, *words, *more, steps=steps), tmp_path
        )
    for output, is_same in {"warm": True, "full": False}.items():
        after = load_file(tmp_path / output / "final" / WEIGHTS)
        assert all(torch.equal(after[name], before[name]) for name in before) == is_same
    head = [
        load_file(folder / WEIGHTS)["score.weight"]
        for folder in (run / "reward/final", tmp_path / "warm/final_critic")
    ]
    assert not torch.equal(*head)
    rates = [1e-3, 1e-3, 1e-3, 5e-4]  # those that the first update of each iteration used
    assert metrics(tmp_path / "full", "train/lr") == pytest.approx(rates)
    assert metrics(tmp_path / "cut", "train/lr") == pytest.approx(rates)
    assert metrics(tmp_path / "cut", "policy/updates") == [4, 4, 2, 2]
    assert metrics(tmp_path / "cut", "policy/update_kl")[:2] == [0, 0]
    assert min(metrics(tmp_path / "cut", "policy/update_kl")[2:]) > 1e-9


def test_ptx_without_advantages_equals_plain_training(
    world, run, functions, tmp_path
):  # fmt: skip
    """Equal scores give no advantage, so that only the loss on demonstrations remains."""
    lines = (world / "demonstrations.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(lines * 2))  # one batch of 16, in whatever order
    words = ["--ptx_data", str(tmp_path / "few.jsonl"), "--ptx_coef", "3", "--max_grad_norm", "0"]
    words += ["--advantage_estimator", "rloo", "--samples_per_prompt", "2", "--kl_coef", "0"]
    words += ["--reward_function", f"{functions}:constant", "--ppo_epochs", "1", "--global_batch_size", "16"]
    words = options(world, run, tmp_path / "out", *words, "--missing_eos_penalty", "0", steps=2)
    place = words.index("--reward_model_name_or_path")
    del words[place : place + 2]
    succeed("step3_ppo.main", words, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(run / "sft/final")
    tokenizer = AutoTokenizer.from_pretrained(run / "sft/final")
    total = tokens = 0
    for record in map(json.loads, lines):
        messages = record["messages"]
        texts = [
            tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template(messages, tokenize=False),
        ]
        start, full = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        ids = torch.tensor(tokenizer(texts[1], add_special_tokens=False).input_ids)
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = total - logprobs[start - 1 :].sum()
        tokens += full - start
    loss = total / tokens
    (3 * loss).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    result = metrics(tmp_path / "out", "ptx/loss")
    assert result[0] == pytest.approx(loss.item(), rel=1e-5) and result[1] < result[0]
    assert metrics(tmp_path / "out", "policy/grad_norm")[0] == pytest.approx(norm.item(), rel=1e-4)


def test_entropy_bonus_and_kl_penalty_have_the_right_sign(world, run, functions, tmp_path):
    words = ["--reward_function", f"{functions}:length:0.1", "--eval_fraction", "0", "--kl_coef"]
    result = {}
    for name, more in {
        "plain": ["0"], "k2": ["2", "--kl_penalty", "k2"], "k3": ["2", "--kl_penalty", "k3"],
        "entropy": ["0", "--entropy_coef", "0.5"],
    }.items():  # fmt: skip
        succeed("step3_ppo.main", options(world, run, tmp_path / name, *words, *more, steps=6), tmp_path)
        result[name] = {m: metrics(tmp_path / name, m)[-1] for m in ("kl/mean", "policy/entropy")}
    assert max(result["k2"]["kl/mean"], result["k3"]["kl/mean"]) < 0.5 * result["plain"]["kl/mean"]
    assert result["entropy"]["policy/entropy"] > result["plain"]["policy/entropy"]


def test_gold_evaluates_and_stops_without_training(world, run, functions, tmp_path):
    """With the reward model as gold, gold equals the score. A gold score that never rises ends the run."""
    words = ["--num_samples", "12", "--eval_steps", "1"]
    plain, same, stopped = (tmp_path / name for name in ("plain", "same", "stopped"))
    succeed("step3_ppo.main", options(world, run, plain, *words), tmp_path)
    gold = ["--gold_reward_model", str(run / "reward/final"), "--gold_function", f"{functions}:length"]
    succeed("step3_ppo.main", options(world, run, same, *words, *gold), tmp_path, 2)
    samples = [json.loads(line) for line in (same / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 * 4 and samples[0]["step"] == 0 and samples[-1]["step"] == 3
    for one in samples:
        assert one["gold"] == pytest.approx(one["score"] + len(one["response"]), rel=1e-5, abs=1e-4)
    last = [one["gold"] for one in samples if one["step"] == 3]
    assert metrics(same, "eval/gold")[-1] == pytest.approx(sum(last) / len(last), rel=1e-5)
    assert metrics(same, "eval/score") == pytest.approx(metrics(plain, "eval/score"), rel=1e-3)

    gold = ["--gold_function", f"{functions}:constant", "--best_metric", "eval/gold", "--early_stopping", "2"]
    gold += ["--logging_steps", "7"]  # the line of both steps is written at the end
    result = run_stage("step3_ppo.main", options(world, run, stopped, *words, *gold, steps=9), tmp_path)
    assert result.codes == [0] and "stopped early: 2 evaluations" in result.output
    assert len(metrics(stopped, "reward/mean")) == 1 and (stopped / "final" / WEIGHTS).exists()


def test_options_that_need_others(world, run, functions, tmp_path):
    for words, part in {
        ("--best_metric", "eval/gold"): "needs --gold_reward_model or --gold_function",
        ("--early_stopping", "3"): "needs a --best_metric",
        ("--early_stopping", "3", "--best_metric", "eval/score", "--eval_steps", "0"): "needs --eval_steps",
        ("--dual_clip", "0.5"): "--dual_clip 0.5 must be above 1, or 0 for none",
        ("--rollout_ratio_cap", "0.5"): "--rollout_ratio_cap 0.5 must be at least 1, or 0 for none",
        ("--kl_controller", "adaptive", "--kl_coef", "0"): "--kl_coef 0",
        ("--kl_controller", "adaptive", "--kl_horizon", "3"): "--kl_horizon 3 must be at least",
        ("--gold_function", f"{functions}:nothing"): "--gold_function",
        ("--gold_reward_model", str(run / "sft/final")): "--gold_reward_model",
        ("--ptx_data", "missing.jsonl"): "missing.jsonl",
    }.items():
        refused = run_stage("step3_ppo.main", options(world, run, tmp_path / "out", *words), tmp_path)
        assert refused.codes == [2] and part in refused.output, refused.output
