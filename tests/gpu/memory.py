"""Checks of memory and speed through the launch scripts, on a 1B model, against launch/plan."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from common.training.metrics import utilisation
from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.predict import predict_phases
from tests.bench.fixture import make_tokenizer
from tests.gpu.setting import GIB, Outcome, Setting, launch
from tests.stages import ZERO, metrics

ABOVE_PLAN = 1.1  # most measured memory, relative to the prediction
LEAST_MFU = 0.3  # a pass of four is not counted with checkpointing
LARGEST_GAP = 0.05  # mean difference of sampler and trainer in bf16, nats per token
RECORDS = 64


def fine_tuning(setting: Setting) -> Outcome:
    """Step 1 on full rows, with and without checkpointing: peak memory, and model FLOPs utilisation."""
    length, rows = (64, 2) if setting.is_cpu else (1024, 8)
    folder, words = write_models(setting)
    data = write_records(folder / "demonstrations.jsonl", words, prompt=16, completion=length - 17)  # and EOS
    figures, speeds, passed = [], {}, True
    for name, checkpointing in (("recomputed", True), ("kept", False)):
        options = {
            "zero_config": ZERO / "zero2.json", "max_length": length, "micro_batch_size": rows,
            "global_batch_size": 2 * rows, "gradient_checkpointing": checkpointing,
        }  # fmt: skip
        own = {"model_name_or_path": folder / "policy", "train_data": data, "num_samples": 0}
        output = train(setting, "step1_sft.sh", f"activations_{name}", 6, options | own)
        peak = metrics(output, "memory/peak_gib")[-1]
        expected = max(planned(setting, "step 1", options).values())
        figures.append(f"activations {name}: {peak:.2f} GiB, planned {expected:.2f}")
        if not setting.is_cpu:
            share, least = metrics(output, "train/mfu")[-1], LEAST_MFU * (0.75 if checkpointing else 1)
            passed &= peak <= ABOVE_PLAN * expected and share >= least
            figures.append(f"MFU {share:.2f}")
            peak_flops = utilisation(1.0, 1.0)["train/mfu"].weight
            speeds["matmul_flops"] = share * peak_flops  # without checkpointing: the last one
    return Outcome(passed, "; ".join(figures) + "; not judged: needs CUDA" * setting.is_cpu, speeds)


def iteration(setting: Setting) -> Outcome:
    """Step 3 with top-p and all that leaves the device: memory of each phase, and the gap of the sampler."""
    prompt, response = (16, 8) if setting.is_cpu else (256, 128)
    folder, words = write_models(setting)
    data = write_records(folder / "prompts.jsonl", words, prompt=prompt)
    options = {
        "zero_config": ZERO / "zero2.json", "micro_batch_size": 8, "global_batch_size": 32,
        "rollout_batch_size": 64, "max_prompt_length": prompt, "max_response_length": response,
        "top_p": 0.9, "offload_frozen": True, "offload_states": True,
    }  # fmt: skip
    own = {
        "actor_model_name_or_path": folder / "policy", "reward_model_name_or_path": folder / "reward",
        "prompt_data": data, "ppo_epochs": 1, "compile_generation": "no", "eval_steps": 0,
    }  # fmt: skip
    output = train(setting, "step3_ppo.sh", "iteration", 2, options | own)
    gap = max(metrics(output, "rollout/gap_mean"))
    expected = planned(setting, "step 3", options | {"reward_model_name_or_path": [str(folder / "reward")]})
    figure = f"gap {gap:.2g} nats per token"
    if setting.is_cpu:
        return Outcome(gap <= LARGEST_GAP, f"{figure}; memory not judged: needs CUDA")
    peaks = {name: max(metrics(output, f"memory/allocated_gib_{name}")) for name in expected}
    figure += "".join(f"; {name} {peaks[name]:.2f} GiB, planned {expected[name]:.2f}" for name in peaks)
    fits = all(peaks[name] <= ABOVE_PLAN * expected[name] for name in peaks)
    return Outcome(gap <= LARGEST_GAP and fits, figure)


def write_models(setting: Setting) -> tuple[Path, list[str]]:
    """A folder with `policy` and `reward` of 1B parameters, and words that are one token."""
    folder = setting.folder / "1B"
    tokenizer, words = make_tokenizer(random.Random(0))
    if not folder.exists():
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        for kind, model in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
            with setting.device:
                made = model(setting.config("1B", num_labels=1, **ids))
            made.to(torch.bfloat16).save_pretrained(folder / kind)
            tokenizer.save_pretrained(folder / kind)
    return folder, words


def write_records(path: Path, words: list[str], **lengths: int) -> Path:
    """Records whose fields have these numbers of tokens."""
    draw = random.Random(0)
    records = (
        {field: "".join(f" {draw.choice(words)}" for _ in range(count)) for field, count in lengths.items()}
        for _ in range(RECORDS)
    )
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def train(setting: Setting, script: str, name: str, steps: int, options: dict[str, Any]) -> Path:
    """Run a step for some steps without held-out data; its folder, without the weights."""
    output = setting.folder / name
    options |= {
        "output_dir": output, "max_steps": steps, "logging_steps": 1, "save_steps": 0, "eval_fraction": 0,
    }  # fmt: skip
    launch(script, [word for name, value in options.items() for word in (f"--{name}", value)])
    for folder in output.glob("final*"):
        shutil.rmtree(folder)
    return output


def planned(setting: Setting, step: str, options: dict[str, Any]) -> dict[str, float]:
    """GiB that launch/plan predicts for the phases of the metrics; on a GPU without the CUDA context."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    device, folder = "cpu" if setting.is_cpu else "gpu", str(setting.folder / "1B/policy")
    peaks: dict[str, float] = {}
    for phase in predict_phases(PlanOptions(device=device, model_name_or_path=folder, **options))[step]:
        name = {"rollout": "rollout", "scoring": "score"}.get(phase.name, "train")
        size = (total(phase.parts) - phase.parts["fixed"] * (not setting.is_cpu)) / GIB
        peaks[name] = max(peaks.get(name, 0.0), size)
    return peaks
