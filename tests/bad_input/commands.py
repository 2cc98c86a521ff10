"""The options of every command on a tiny model, and the check that it refuses bad input in one line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.ranks import run_stage
from tests.stages import ppo, reward, sft

MODULES = {
    "step1_sft": "step1_sft.main", "step2_reward": "step2_reward.main",
    "step2_direct": "step2_reward.direct.main", "step2_ilql": "step2_reward.ilql.main",
    "step2_process": "step2_reward.process.main",
    "step3_ppo": "step3_ppo.main", "step3_safe": "step3_ppo.safe.main",
    "evaluate_sft": "step1_sft.evaluate", "evaluate_reward": "step2_reward.evaluation.main",
    "evaluate_ppo": "step3_ppo.compare.main", "judge": "step2_reward.judge.main",
    "critique": "step1_sft.critique", "score": "step2_reward.evaluation.score_file",
    "annotate": "step2_reward.annotate.main", "sample_pairs": "step2_reward.annotate.sample_pairs",
    "best_of_n": "step3_ppo.best_of_n.main", "chat": "launch.chat.main", "plan": "launch.plan.main",
}  # fmt: skip
# Records of each command that reads data, and the option that names their file.
RECORDS = {
    **dict.fromkeys(("step1_sft", "evaluate_sft", "score"), {"prompt": "a", "completion": "b"}),
    **dict.fromkeys(
        ("step2_reward", "step2_direct", "evaluate_reward", "judge"),
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "step2_process": {"prompt": "a", "steps": ["b", "c"], "labels": [1, 0]},
    "step2_ilql": {"prompt": "a", "response": "b", "score": 1},
    "annotate": {"prompt": "a", "response_a": "b", "response_b": "c"},
    **dict.fromkeys(("step3_ppo", "evaluate_ppo", "critique", "sample_pairs", "best_of_n"), {"prompt": "a"}),
}
DATA = {
    **dict.fromkeys(
        ("step1_sft", "step2_reward", "step2_direct", "step2_process", "step2_ilql"), "train_data"
    ),
    **dict.fromkeys(("step3_ppo", "critique", "sample_pairs", "best_of_n"), "prompt_data"),
    **dict.fromkeys(("evaluate_sft", "evaluate_reward", "evaluate_ppo"), "eval_data"),
    "judge": "preference_data", "score": "input", "annotate": "pair_data",
}  # fmt: skip
MODEL = {
    "step3_ppo": "actor_model_name_or_path", "evaluate_reward": "reward_model_name_or_path",
    "score": "reward_model_name_or_path",
}  # fmt: skip
OUTPUT = {"evaluate_sft": "output", "score": "output", "annotate": "output"}
# step3_safe reads data and models as step3_ppo does, with the same functions.
READS_ZERO = [name for name in MODULES if name not in ("score", "annotate", "chat", "step3_safe")]
READS_MODEL = [name for name in MODULES if name not in ("annotate", "step3_safe")]

Files = dict[str, Any]  # content of files: bytes, text, or what becomes JSON


def options(command: str, world: Path, folder: Path) -> list[str]:
    """Options with which the command succeeds; its output is DIR/out."""
    model, scalar, out = world / "model", world / "reward_model", folder / "out"
    match command:
        case "step1_sft":
            return sft(world, out, 1)
        case "step2_reward" | "step2_direct":
            return reward(world, model, out, 1)
        case "step3_ppo":
            return ppo(world, model, scalar, out, 1)
        case "step3_safe":
            return [*ppo(world, model, scalar, out, 1), "--cost_model_name_or_path", str(scalar)]
    words = [f"--{MODEL.get(command, 'model_name_or_path')}", str(model)]
    if command in ("evaluate_reward", "score"):
        words[1] = str(scalar)
    if command == "annotate":
        words = ["--port", "0"]
    if command in DATA:
        (folder / "good.jsonl").write_text(3 * f"{json.dumps(RECORDS[command])}\n")
        words += [f"--{DATA[command]}", str(folder / "good.jsonl")]
        suffix = ".jsonl" if command in OUTPUT else ""
        words += [f"--{OUTPUT.get(command, 'output_dir')}", f"{out}{suffix}"]
    if command in ("best_of_n", "evaluate_ppo"):
        words += ["--reward_model_name_or_path", str(scalar)]
    if command in ("best_of_n", "step2_process", "step2_ilql"):
        words += ["--eval_fraction", "0"]
    if command == "step2_ilql":  # the records are equal
        words += ["--standardise_scores", "False"]
    if command in ("best_of_n", "evaluate_ppo", "sample_pairs", "critique"):
        words += ["--max_response_length", "4"]
    return words


def check_refusal(
    command: str, words: Sequence[str], parts: str | Sequence[str], world: Path, folder: Path,
    files: Files | None = None,
) -> None:  # fmt: skip
    """Run a command with more options; DIR in them and in `parts` is `folder`, in which `files` are written.

    It must end with exit code 2 and one line that holds `parts`, and write nothing.
    """
    for name, content in (files or {}).items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    full = [*options(command, world, folder), *(word.replace("DIR", str(folder)) for word in words)]
    before = contents(folder)
    result = run_stage(MODULES[command], full, folder.with_name(f"{folder.name}_logs"), timeout=60)
    lines = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert result.codes == [2] and len(lines) == 1, result.output
    assert "Traceback" not in result.output, result.output
    for part in [parts] if isinstance(parts, str) else parts:
        assert part.replace("DIR", str(folder)) in lines[0], lines[0]
    assert contents(folder) == before


def contents(folder: Path) -> list[tuple[str, int]]:
    """Paths and sizes below a folder."""
    return sorted((str(path), path.stat().st_size * path.is_file()) for path in folder.rglob("*"))
