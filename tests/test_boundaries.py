"""The rules of the house: who imports whom, what is pure, and how long a file may be."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.lib.check_options import COMMANDS
from tests.conftest import REPOSITORY

STAGES = ("step1_sft", "step2_reward", "step3_ppo")
PYTHON = sorted(
    path.relative_to(REPOSITORY)
    for folder in ("common", "launch", *STAGES)
    for path in (REPOSITORY / folder).rglob("*.py")
)
PURE = [
    path
    for path in PYTHON
    if path.name in ("loss.py", "losses.py", "advantages.py", "rewards.py", "tensor_ops.py")
    or path.name in ("segments.py", "conversation.py", "fields.py", "prompt_boundary.py")
]
# The folders of common/ in the order of imports: each imports those to its left alone.
ORDER = ({"runtime", "numeric"}, {"text"}, {"data"}, {"model"}, {"generation", "training", "ai_feedback"})
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
MODULES = {".".join(path.with_suffix("").parts): path for path in PYTHON}
SCRIPTS = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "launch").rglob("*.sh"))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at any depth."""
    modules = set()
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module)
            modules |= {f"{node.module}.{name.name}" for name in node.names} & MODULES.keys()
    return modules


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_there_is_something_to_look_at():
    assert {path.parts[0] for path in PYTHON} >= {"common", *STAGES}
    assert {str(path.parent) for path in PURE} >= {"common/numeric", "common/text", *STAGES}
    assert len(SCRIPTS) > 3


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_no_module_reaches_into_a_stage_that_is_not_its_own(path):
    if path.parts[0] != "launch":
        assert not roots(path) & (set(STAGES) - {path.parts[0]})
    assert "tests" not in roots(path)


@pytest.mark.parametrize("path", [path for path in PYTHON if path.parts[0] == "common"], ids=str)
def test_imports_inside_common_run_one_way(path):
    assert roots(path).isdisjoint({"launch", *STAGES})
    for name in imports(path):
        if name.startswith("common."):
            folder, other = path.parts[1], name.split(".")[1]
            assert other == folder or LEVEL[other] < LEVEL[folder], f"{path} imports {name}"


def test_no_imports_in_a_circle():
    graphlib.TopologicalSorter(
        {name: imports(path) for name, path in MODULES.items()}
    ).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", PURE, ids=str)
def test_formulas_are_pure(path):
    standard = {"collections", "contextlib", "dataclasses", "decimal", "enum", "functools", "itertools"}
    standard |= {"json", "math", "typing", "unicodedata"}
    assert roots(path) <= {"torch", "common"} | standard
    ours = {name for name in imports(path) if name.split(".")[0] == "common"}
    assert ours <= {
        "common.numeric.tensor_ops",
        "common.text.conversation",
        "common.text.fields",
        "common.text.prompt_boundary",
    }
    assert not any(name.startswith("torch.distributed") for name in imports(path))


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_modules_are_short_and_named_for_what_they_do(path):
    text = (REPOSITORY / path).read_text()
    assert path.name != "utils.py"
    if path.name == "__init__.py":
        assert text == ""
    assert len(text.splitlines()) <= 250


def test_test_packages_are_empty_too():
    assert all(path.read_text() == "" for path in (REPOSITORY / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_launch_scripts_are_short_strict_and_well_formed(path):
    lines = (REPOSITORY / path).read_text().splitlines()
    if path.name in ("environment.sh", "steps_by_size.sh"):  # sourced, under the settings of the script
        assert not lines[0].startswith("#!")
    else:
        commands = [line for line in lines if line.strip() and not line.startswith("#")]
        assert lines[0] == "#!/usr/bin/env bash"
        assert commands[0] == "set -euo pipefail"
        assert len(lines) <= 40
    checked = subprocess.run(["bash", "-n", str(REPOSITORY / path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_options_are_checked_before_a_library_is_loaded():
    """So that --help and a refused option take a moment, not the seconds of an import."""
    options = [imported.rpartition(".")[0] for imported in COMMANDS.values()]
    heavy = {"torch", "deepspeed", "transformers", "numpy"}
    code = f"import sys, {', '.join(options)}; print({heavy} & {{*sys.modules}})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert printed.stdout.strip() == "set()", printed.stderr
    runs_python = [
        path.stem
        for path in SCRIPTS
        if re.search("^run_(stage|alone) ", (REPOSITORY / path).read_text(), re.M)
    ]
    assert sorted(runs_python) == sorted(COMMANDS)


def test_formulas_import_without_deepspeed_or_transformers():
    modules = ", ".join(".".join(path.with_suffix("").parts) for path in PURE)
    code = f"import sys, {modules}; print({{'deepspeed', 'transformers'}} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert printed.stdout.strip() == "set()", printed.stderr


@pytest.mark.parametrize("path", [path for path in PYTHON if not path.stem.endswith("_internals")], ids=str)
def test_private_names_of_libraries_are_in_the_files_for_them(path):
    allowed = {"_asdict", "_replace", "_fields", "_exit"}  # public, by the standard library's documentation
    allowed |= {"_format_args", "_fingerprint"}  # used once: argparse's layout, the content of a hub dataset
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in (
            "common",
            "launch",
            *STAGES,
        ):
            private = [name.name for name in node.names if name.name.startswith("_")]
            assert not private, f"{path}:{node.lineno}: {private}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_ours = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert is_ours or node.attr in allowed, f"{path}:{node.lineno}: {node.attr}"
