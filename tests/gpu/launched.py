"""Checks through the launch scripts, on tiny models: the quickstart, stops, bytes, moves, offload, ZeRO-3."""

import importlib.util
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common.runtime.process import STOPPED
from common.runtime.vllm_version import installed_version
from tests.gpu.setting import Outcome, Setting, launch, skipped, start, write_config, write_policy
from tests.stages import ZERO, metrics, ppo, reward, sft

LEAST_GOLD = 0.85  # of the quickstart's policy; 0.92 on the CPU in fp32
NEAR_ONE = 2e-3  # of the first ratios of an iteration, in bf16
CLOSE = 1e-2  # losses, in nats per token
LARGEST_GAP = 0.05  # mean difference of sampler and trainer in bf16, nats per token
EAGER = ["--compile_generation", "no"]  # compiled steps have checks of their own


def quickstart(setting: Setting) -> Outcome:
    """The policy pleases the gold rule, which training never sees; no update is skipped; KL begins at 0."""
    output = setting.folder / "quickstart"
    words = ["--max_steps", 2, "--eval_steps", 0, "--max_eval_samples", 8] if setting.is_cpu else []
    launch("quickstart.sh", ["--logging_steps", 1, *words], OUTPUT=output)
    run, report = output / "step3_ppo", json.loads((output / "report.json").read_text())
    kl, lost = metrics(run, "kl/mean")[0], metrics(run, "train/skipped_updates")[-1]
    ratio = max(abs(one - 1) for one in metrics(run, "policy/ratio"))
    dtype = next(iter(load_file(run / "final/model.safetensors").values())).dtype
    gold, score = ([report[f"{name}_{policy}"] for policy in ("sft", "ppo")] for name in ("gold", "reward"))
    passed = abs(kl) <= 1e-4 and ratio <= NEAR_ONE and not lost
    if not setting.is_cpu:
        passed &= gold[1] >= LEAST_GOLD and gold[1] > gold[0] and score[1] > score[0]
        passed &= dtype == torch.bfloat16
    figure = f"gold {gold[0]:.2f} -> {gold[1]:.2f}, score {score[0]:.2f} -> {score[1]:.2f}"
    figure += f", first KL {kl:.1g}, ratio within {ratio:.1g} of 1, {lost:.0f} updates skipped, {dtype}"
    return Outcome(passed, figure)


def stop(setting: Setting) -> Outcome:
    """SIGTERM in step 2: exit code 75, and the same command resumes."""
    output = setting.folder / "stopped"
    words = reward(setting.world, setting.world / "model", output)
    script, begin = start("step2_reward.sh", [*words, "--max_steps", 100_000]), time.monotonic()
    while script.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.1)
    script.send_signal(signal.SIGTERM)
    code, seconds = script.wait(), time.monotonic() - begin
    steps = len(metrics(output, "train/loss"))
    launch("step2_reward.sh", [*words, "--max_steps", steps + 2])
    more = len(metrics(output, "train/loss")) - steps
    figure = f"exit code {code} after {steps} steps and {seconds:.0f} s; resumed for {more} steps"
    return Outcome(code == STOPPED and more == 2, figure)


def deterministic(setting: Setting) -> Outcome:
    """The same bytes with --deterministic: again, resumed, and with --offload_states."""
    once = iterate(setting, "once")
    others = {
        "again": iterate(setting, "again"),
        "resumed": iterate(setting, "resumed", "--save_steps", 3, resumes=True),
        "--offload_states": iterate(setting, "states_away", "--offload_states"),
    }
    differences = {name: distance(once, files) for name, files in others.items()}
    texts = [f"{name}: {f'differs by {far:.2g}' if far else 'equal'}" for name, far in differences.items()]
    return Outcome(not any(differences.values()), ", ".join(texts))


def iterate(setting: Setting, name: str, *words: Any, resumes: bool = False) -> list[Path]:
    """Six deterministic iterations of step 3; files of the weights. resumes: the second half again."""
    output = setting.folder / name
    options = [*ppo(setting.world, setting.world / "model", setting.world / "reward", output, steps=6)]
    options += ["--zero_config", ZERO / "zero2.json", "--deterministic", *EAGER, *words]
    launch("step3_ppo.sh", options)
    if resumes:
        for folder in ("checkpoints/step_000006", "final", "final_critic"):
            shutil.rmtree(output / folder)
        launch("step3_ppo.sh", options)
        assert "resumed from" in (output / "train.log").read_text(), "did not resume"
    return [output / folder / "model.safetensors" for folder in ("final", "final_critic")]


def distance(files: list[Path], others: list[Path]) -> float:
    """Largest difference of weights; 0 only for files of the same bytes."""
    if all(a.read_bytes() == b.read_bytes() for a, b in zip(files, others, strict=True)):
        return 0.0
    pairs = [(load_file(a), load_file(b)) for a, b in zip(files, others, strict=True)]
    return max(
        max((one[name].float() - other[name].float()).abs().max().item() for name in one)
        for one, other in pairs
    )


def move(setting: Setting) -> Outcome:
    """A checkpoint marked as one of two ranks resumes through the universal form, at ZeRO-2 and ZeRO-3."""
    differences = []
    for stage in (2, 3):
        words = ["--zero_config", ZERO / f"zero{stage}.json", "--max_steps", 4, "--save_steps", 2]
        output = setting.folder / f"moved{stage}"
        losses = learn(setting, output.name, *words)
        shutil.rmtree(output / "checkpoints/step_000004")
        manifest = output / "checkpoints/step_000002/manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"world_size": 2}))
        differences.append(largest_difference(losses, learn(setting, output.name, *words)))
        assert "converting" in (output / "train.log").read_text(), "did not take the universal form"
    figure = " and ".join(f"{one:.2g}" for one in differences)
    return Outcome(max(differences) <= CLOSE, f"losses differ by {figure} nats")


def learn(setting: Setting, name: str, *words: Any, **variables: Any) -> list[float]:
    """Losses of five steps of step 1, without sample answers."""
    output = setting.folder / name
    launch("step1_sft.sh", [*sft(setting.world, output), "--num_samples", 0, *words], **variables)
    return metrics(output, "train/loss")


def largest_difference(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def offload(setting: Setting) -> Outcome:
    """Offloaded optimisers, whose extension is compiled in a new folder, learn as that of the GPU."""
    extensions = {"TORCH_EXTENSIONS_DIR": setting.folder / "extensions"}
    expected, *others = (
        learn(setting, name, "--zero_config", ZERO / f"{name}.json", **extensions)
        for name in ("zero2", "zero2_offload", "zero3_offload")
    )
    differences = [largest_difference(expected, losses) for losses in others]
    compiled = len([*setting.folder.glob("extensions/**/*.so")])
    figure = "losses differ by {:.2g} and {:.2g} nats; {} extension compiled".format(*differences, compiled)
    return Outcome(max(differences) <= CLOSE and compiled == (not setting.is_cpu), figure)


def vocabulary(setting: Setting) -> Outcome:
    """ZeRO-3 with a token more than the model has rows: the same responses with and without gathering."""
    size = json.loads((setting.world / "model/config.json").read_text())["vocab_size"]
    policy = write_policy(setting.world / "model", setting.folder / "smaller", vocab_size=size - 1)
    zero = write_config(setting, "zero3_fp32", "zero3")  # in bf16 a draw may differ by rounding
    samples = []
    for gathers in ("true", "false"):
        output = setting.folder / f"vocabulary_{gathers}"
        words = [*ppo(setting.world, policy, setting.world / "reward", output, steps=2), *EAGER]
        launch("step3_ppo.sh", [*words, "--zero_config", zero, "--gather_for_generation", gathers])
        samples.append([json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()])
    texts, others = ([one["response"] for one in part if not one["step"]] for part in samples)
    same = sum(a == b for a, b in zip(texts, others, strict=True))
    return Outcome(same == len(texts) > 0, f"{same} of {len(texts)} responses the same")


def hpz(setting: Setting) -> Outcome:
    """ZeRO-3 with a copy of the weights per machine (hpZ) learns as without it, on two ranks."""
    if not setting.is_cpu and torch.cuda.device_count() < 2:
        return skipped("needs 2 GPUs")
    losses = [
        learn(setting, name, "--zero_config", write_config(setting, name, "zero3", **zero), NUM_GPUS=2)
        for name, zero in (("plain", {}), ("hpz", {"zero_hpz_partition_size": 2}))
    ]
    difference = largest_difference(*losses)
    return Outcome(difference <= CLOSE, f"losses differ by {difference:.2g} nats")


def flash_attention(setting: Setting) -> Outcome:
    """Packed rows learn with flash_attention_2 as with SDPA."""
    if setting.is_cpu or not importlib.util.find_spec("flash_attn"):
        return skipped("needs CUDA" if setting.is_cpu else "flash_attn is not installed")
    losses = [
        learn(setting, kernels, "--packing", "--max_length", 256, "--attn_implementation", kernels)
        for kernels in ("sdpa", "flash_attention_2")
    ]
    difference = largest_difference(*losses)
    return Outcome(difference <= CLOSE, f"losses differ by {difference:.2g} nats")


def vllm(setting: Setting) -> Outcome:
    """vLLM samples from the current weights of the policy: trainer and sampler agree in each iteration."""
    if not installed_version():
        return skipped("vLLM is not installed")
    # vLLM's kernels take no heads as small as those of the tiny model.
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    policy = write_policy(setting.world / "model", setting.folder / "wide", **sizes)
    output = setting.folder / "vllm"
    words = ppo(setting.world, policy, setting.world / "reward", output, steps=3)
    launch("step3_ppo.sh", [*words, "--rollout_engine", "vllm"])
    gaps = metrics(output, "rollout/gap_mean")
    figure = f"gap of at most {max(gaps):.2g} nats per token in {len(gaps)} iterations"
    return Outcome(max(gaps) <= LARGEST_GAP, figure)
