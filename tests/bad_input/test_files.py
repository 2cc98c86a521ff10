"""Reward functions, outputs, and files of a run or for AI feedback that were damaged by hand."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.commands import DATA, OUTPUT, check_refusal

# Code of the file, and a part of the line; the function is f.
FUNCTIONS = {
    "exit at import": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "end at import": ("import os; os._exit(0)", "SystemExit: 0"),
    "exit": ("def f(**k): exit(3)", "SystemExit: 3"),
    "end": ("import os\ndef f(**k): os._exit(0)", "SystemExit: 0"),
    "end in a generator": ("import os\ndef f(**k):\n  yield 1\n  os._exit(0)", "SystemExit: 0"),
    "interrupt": ("def f(**k): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "error without text": (
        "class E(BaseException):\n  def __str__(self): raise self\ndef f(**k): raise E",
        "f: E;",
    ),
    "lines": ("def f(**k): raise ValueError('a\\nb')", "ValueError: a b"),
    "recursion": ("def f(**k): return f(**k)", "RecursionError"),
    "too large": ("def f(responses, **k): return [1e308 for _ in responses]", "returned 1e+308"),
    "too long": ("def f(responses, **k): return [10 ** 400 for _ in responses]", "finite number"),
    "complex": ("def f(responses, **k): return [1j for _ in responses]", "finite number"),
    "none": ("def f(**k): return None", "must return a list"),
    "too few": ("def f(**k): return [1, 2]", "returned 2 scores"),
    "arguments": ("def f(a): return 1", "TypeError"),
    "coroutine": ("async def f(**k): return [1]", "must return a list"),
    "syntax": ("def f(", "SyntaxError"),
    "null byte": ("\0", "null bytes"),
    "no function": ("f = 5", "has no function f"),
}
OUTPUTS = ["DIR/file", "DIR/null", "/proc/x", "DIR/file/x", "DIR/" + "x" * 300]
# Command, options, a file, and a part of the line.
DAMAGED = [
    ("judge", ["--constitution", "DIR/c.yaml"], b"- a: b\n", "principle 1"),
    ("judge", ["--constitution", "DIR/c.yaml"], b"[a, b", "not valid YAML"),
    ("critique", ["--constitution", "DIR/c.yaml"], b"2001-99-99", "constitution"),
    ("critique", ["--constitution", "DIR/c.yaml"], b"[" * 9999, "not valid YAML"),
    ("judge", ["--constitution", "DIR/c.txt"], b"\xff\xfe", "not UTF-8 text"),
    ("judge", ["--constitution", "DIR"], b"", "Is a directory"),
    ("judge", ["--judge_template", "DIR/t.txt"], b"Which?", "{prompt}"),
    ("critique", ["--critique_template", "DIR/t.txt"], b"", "{prompt}"),
    ("critique", ["--revision_template", "DIR/t.txt"], b"\xff", "not UTF-8 text"),
    ("annotate", [], ("out.clicks.jsonl", b"[" * 100_000 + b"\n"), "not a click"),
    ("annotate", [], ("out.clicks.jsonl", b"5\n"), "not a click"),
    ("annotate", [], ("out.jsonl", b"{}\n"), "click log"),
    ("score", [], ("out.jsonl", b"[" * 100_000 + b"\n"), "DIR/out.jsonl"),
    ("score", [], ("out.jsonl", b"5\n"), "DIR/out.jsonl"),
    ("best_of_n", [], ("out/samples.jsonl", b"[" * 100_000 + b"\n"), "samples.jsonl:1"),
    ("best_of_n", [], ("out/samples.jsonl", b"[1]\n"), "samples.jsonl:1"),
    ("judge", [], ("out/journal", b"[" * 100_000 + b"\n"), "journal:1: damaged"),
    ("critique", [], ("out/journal", b'{"a": 1}\n'), "journal:1: damaged"),
    ("sample_pairs", [], ("out/responses_1.journal", b"\xff\n"), "journal:1: damaged"),
    ("step1_sft", [], ("out/options.json", b"[" * 100_000), "options.json"),
    ("step2_reward", [], ("out/options.json", b"[]"), "options.json"),
    ("step3_ppo", [], ("out/options.json", b"\xff"), "options.json"),
    ("step1_sft", ["--resume_from_checkpoint", "DIR/c"], ("c/state.json", b"[" * 100_000), "complete"),
    ("step2_reward", ["--resume_from_checkpoint", "DIR/c"], ("c/state.json", b"5"), "complete"),
    ("step3_ppo", ["--resume_from_checkpoint", "DIR/c"], ("c/state.json", b"{}"), "complete"),
    ("step2_direct", ["--resume_from_checkpoint", "DIR/no"], b"", "no such folder"),
]  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    code, part = FUNCTIONS[name]
    command = ("step3_ppo", "best_of_n")[[*FUNCTIONS].index(name) % 2]
    words = ["--reward_function", "DIR/r.py:f"]
    if command == "step3_ppo":
        words += ["--eval_fraction", "0"]
    check_refusal(command, words, ["--reward_function", part], models, tmp_path, {"r.py": code})


@pytest.mark.parametrize("name", ["process", "reward_model_1"])
def test_function_with_the_name_of_another_score_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    """Of two scores with one name, samples.jsonl would have the last one alone."""
    code = f"def {name}(prompts, responses, records):\n    return [0.0] * len(responses)\n"
    words = ["--reward_function", f"DIR/r.py:{name}"]
    check_refusal("best_of_n", words, f"{name}: a score in", models, tmp_path, {"r.py": code})


@pytest.mark.parametrize("command", DATA)
def test_output_is_refused(models: Path, tmp_path: Path, command: str) -> None:
    """A file, a device (by a link, which is safe), and folders that are not there."""
    path = OUTPUTS[[*DATA].index(command) % len(OUTPUTS)]
    path = "DIR" if command in OUTPUT and path == "DIR/file" else path
    (tmp_path / "null").symlink_to("/dev/null")
    words = [f"--{OUTPUT.get(command, 'output_dir')}", path]
    check_refusal(command, words, path, models, tmp_path, {"file": b""})


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path.with_name(f"{tmp_path.name}_disk")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("command", DATA)
def test_full_disk_is_one_line(models: Path, tmp_path: Path, full_disk: Path, command: str) -> None:
    name = "out.jsonl" if command in OUTPUT else "out"
    words = [f"--{OUTPUT.get(command, 'output_dir')}", str(full_disk / name)]
    check_refusal(command, words, [str(full_disk), "No space left on device"], models, tmp_path)
    assert [path.name for path in full_disk.rglob("*") if path.is_file() and path.stat().st_size] == [
        "filler"
    ]


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_damaged_file_is_refused(models: Path, tmp_path: Path, number: int) -> None:
    command, words, file, part = DAMAGED[number]
    name = next((Path(word).name for word in words if word.startswith("DIR/") and "." in word), "empty")
    name, content = file if isinstance(file, tuple) else (name, file)
    if command == "score" and not words:
        (tmp_path / "good.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    check_refusal(command, words, part, models, tmp_path, {name: content})
