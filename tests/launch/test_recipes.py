"""Recipes by size of model: each step fits by the plan, and runs with a tiny model in place of its own."""

import os
import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import pytest
from transformers import LlamaConfig

from common.runtime.option_parser import parse_options
from launch.lib.check_options import COMMANDS
from launch.plan.main import CARDS, USABLE
from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.predict import GIB, predict
from tests.bad_input.commands import MODULES
from tests.conftest import REPOSITORY
from tests.ranks import succeed
from tests.stages import make_world

RECIPES = REPOSITORY / "launch/recipes"


def llama(
    layers: int, hidden: int, heads: int, groups: int, mlp: int, words: int, tied: bool = False
) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups,
        intermediate_size=mlp, vocab_size=words, max_position_embeddings=4096, tie_word_embeddings=tied,
    )  # fmt: skip


# The published configurations of the models that are the defaults.
MODELS = {
    "1b": llama(16, 2048, 32, 8, 8192, 128_256, tied=True),
    "7b": llama(32, 4096, 32, 32, 11_008, 32_000),
    "13b": llama(40, 5120, 40, 40, 13_824, 32_000),
    "34b": llama(60, 7168, 56, 8, 20_480, 64_000),
    "70b": llama(80, 8192, 64, 8, 28_672, 128_256),
}
STEPS = {"step1_sft": "step 1", "step2_reward": "step 2", "step3_ppo": "step 3", "step2_direct": "step 1"}
PPO, GRPO, DPO = ("step1_sft", "step2_reward", "step3_ppo"), ("step3_ppo",), ("step2_direct",)
# Recipe and size: the commands, and all GPUs that each needs.
RECIPE = {
    ("llama_1b", "1b"): (PPO, (1, 1, 1)),
    ("llama_7b", "7b"): (PPO, (1, 1, 4)),
    ("llama_13b", "13b"): (PPO, (2, 2, 8)),
    ("llama_34b", "34b"): (PPO, (16, 16, 16)),
    ("llama_70b", "70b"): (PPO, (8, 8, 32)),
    ("llama_grpo", "1b"): (GRPO, (1,)),
    ("llama_grpo", "7b"): (GRPO, (4,)),
    ("llama_grpo", "13b"): (GRPO, (8,)),
    ("llama_grpo", "34b"): (GRPO, (16,)),
    ("llama_grpo", "70b"): (GRPO, (32,)),
    ("llama_dpo", "1b"): (DPO, (1,)),
    ("llama_dpo", "7b"): (DPO, (1,)),
    ("llama_dpo", "13b"): (DPO, (2,)),
    ("llama_dpo", "34b"): (DPO, (16,)),
    ("llama_dpo", "70b"): (DPO, (8,)),
}  # fmt: skip


class Command(NamedTuple):
    """A command of a recipe."""

    name: str
    gpus: int  # per machine
    words: list[str]


def commands(folder: Path, recipe: str, size: str, words: list[str], **variables: str) -> list[Command]:
    """The commands of a recipe, written down by a false `bash` that does not run them."""
    (folder / "bin").mkdir(parents=True)
    false = folder / "bin/bash"
    false.write_text(f'#!/bin/bash\nprintf "%s\\n" "$NUM_GPUS" "$@" "" >>{folder}/commands\n')
    false.chmod(0o755)
    path = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SIZE": size}
    arguments = ["/bin/bash", str(RECIPES / f"{recipe}.sh"), *words]
    done = subprocess.run(
        arguments, env={**os.environ, **path, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    blocks = [block.splitlines() for block in (folder / "commands").read_text().split("\n\n") if block]
    return [Command(Path(script).stem, int(gpus), words) for gpus, script, *words in blocks]


def peak(command: Command, model: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> float:
    """GiB per GPU that the plan predicts for a command."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    given = parse_options(resolve_name(COMMANDS[command.name]), command.words)
    names = {field.name for field in fields(PlanOptions)} & {field.name for field in fields(given)}
    options = PlanOptions(num_gpus=ranks, **{name: getattr(given, name) for name in names})
    options = replace(options, model_name_or_path=str(model), reward_model_name_or_path=[])
    step = STEPS[command.name]
    if command.name == "step2_direct":  # two rows per record; no samples, and the reference is not loaded
        options = replace(
            options,
            micro_batch_size=2 * options.micro_batch_size,
            global_batch_size=2 * options.global_batch_size,
            gather_for_generation=False,
        )
    return total(predict(options)[step].parts) / GIB


def table() -> dict[tuple[str, str], list[list[int]]]:
    """Of each recipe in the README: GPUs and GiB per GPU, by command."""
    rows = re.findall(r"^\| `(\w+)\.sh` \| (\w+) \|(.*?)\|(.*?)\|", (RECIPES / "README.md").read_text(), re.M)
    return {
        (name, size.lower()): [[int(number) for number in cell.split(",")] for cell in cells]
        for name, size, *cells in rows
    }


def test_every_recipe_is_planned():
    assert {name for name, _ in RECIPE} == {path.stem for path in RECIPES.glob("llama_*.sh")}
    assert table().keys() == RECIPE.keys()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for size, config in MODELS.items():
        config.save_pretrained(folder / size)
    return folder


@pytest.mark.end_to_end
@pytest.mark.parametrize(("recipe", "size"), RECIPE)
def test_steps_fit_with_5_percent_to_spare(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, size: str
) -> None:
    """Of the part of a card that the plan calls usable; the README names the same."""
    names, gpus = RECIPE[recipe, size]
    words = ["--model", "m", "--data", "d", "--output", str(tmp_path / "out")]
    reward = {"REWARD": "--reward_function f.py:f"}
    written = commands(tmp_path, recipe, size, words, **reward)
    assert tuple(command.name for command in written) == names
    assert tuple(command.gpus for command in written) == tuple(min(ranks, 8) for ranks in gpus)
    planned = [
        peak(command, models / size, monkeypatch, ranks) for command, ranks in zip(written, gpus, strict=True)
    ]
    room = CARDS["40 GB" if size == "1b" else "80 GB"] * USABLE
    assert max(planned) <= 0.95 * room, planned
    gpus_in_readme, peaks_in_readme = table()[recipe, size]
    assert gpus_in_readme == [*gpus]
    for on_gpu, in_readme in zip(planned, peaks_in_readme, strict=True):
        assert on_gpu == pytest.approx(in_readme, abs=1)


TINY = "--max_steps 1 --global_batch_size 8 --eval_steps 0 --save_steps 0 --max_eval_samples 4"


@pytest.mark.rare
@pytest.mark.parametrize(("recipe", "size"), RECIPE)
def test_recipe_runs_with_a_tiny_model(tmp_path: Path, recipe: str, size: str) -> None:
    """Each command on as many ranks as GPUs per machine, at most 2."""
    world = make_world(tmp_path / "world", hidden_size=64)  # enough for adapters of rank 64
    words = ["--model", str(world / "model"), "--data", str(world), "--output", str(tmp_path / "out")]
    variables = {
        "STEP1_OPTIONS": f"{TINY} --num_samples 1 --sample_length 4",
        "STEP2_OPTIONS": f"{TINY} --max_centre_samples 8",
        "STEP3_OPTIONS": f"{TINY} --rollout_batch_size 16 --max_response_length 8", "DIRECT_OPTIONS": TINY,
        "REWARD": f"--reward_function {tmp_path / 'rewards.py'}:shortness",
    }  # fmt: skip
    (tmp_path / "rewards.py").write_text(
        "def shortness(prompts, responses, records):\n    return [-len(r) for r in responses]\n"
    )
    for command in commands(tmp_path, recipe, size, words, **variables):
        succeed(MODULES[command.name], command.words, tmp_path / "logs", ranks=min(command.gpus, 2))
