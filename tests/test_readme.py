"""Every command, option, metric, variable, function and file that a README names exists."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from launch.lib.check_options import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "launch", "step1_sft", "step2_reward", "step3_ppo", "tests")
PAGES = sorted(
    path.relative_to(REPOSITORY)
    for pattern in ("README.md", ".github/*.md", *(f"{folder}/**/README.md" for folder in FOLDERS))
    for path in REPOSITORY.glob(pattern)
)
OPTION = r"--[a-z][a-z0-9_-]*"
# Of argparse, pytest, pip, sbatch, srun, torchrun and docker.
FOREIGN_OPTIONS = {
    "--help", "--ignore", "--no-deps", "--requeue", "--signal", "--ntasks-per-node",
    "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint",
    "--rm", "--init", "--gpus", "--ipc", "--user",
}  # fmt: skip
EXTENSIONS = r"\.(?:py|sh|md|jsonl?|ya?ml|txt|log|html|css|js|png|svg|toml)"
DATA_FILE = r"\.(?:jsonl|json|csv|parquet)$"


def fences(text: str) -> list[str]:
    """Fenced blocks."""
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code of the running text."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> list[str]:
    """Lines of fenced blocks, as commands may be, and inline code."""
    return [line for block in fences(text) for line in block.replace("\\\n", " ").splitlines()] + spans(text)


@cache
def sources(suffix: str, *folders: str) -> str:
    """The text of all files of a kind, but for this one and the pages themselves."""
    paths = (path for folder in folders or FOLDERS for path in (REPOSITORY / folder).rglob(f"*{suffix}"))
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(paths) if path != Path(__file__))


@cache
def options_of(command: str) -> dict[str, dataclasses.Field]:
    """The options of a command of check_options.COMMANDS."""
    module, _, name = COMMANDS[command].rpartition(".")
    fields = {f"--{field.name}": field for field in dataclasses.fields(getattr(import_module(module), name))}
    return fields | {f"--no_{name[2:]}": field for name, field in fields.items() if field.default is True}


@cache
def all_options() -> set[str]:
    """The options of all commands and of the scripts beside them."""
    added = re.findall(rf'(?:add_argument|addoption)\(\s*"({OPTION})"', sources(".py"))
    cases = re.findall(rf"^ *({OPTION}(?: \| {OPTION})*)\)", sources(".sh"), re.M)
    spelt = {name for command in COMMANDS for name in options_of(command)}
    return spelt | FOREIGN_OPTIONS | {*added} | {name for case in cases for name in case.split(" | ")}


def refused_options(line: str) -> Iterator[str]:
    """Options of a command line, or of inline code, that its command does not have, and values it refuses."""
    script = re.search(r"(\w+)\.sh\b", line)
    known = options_of(script[1]) if script and script[1] in COMMANDS else None
    for name, value in re.findall(rf"(?<![\w-])({OPTION})(?:[ =]([a-z0-9_|/]+)\b)?", line):
        if name not in (all_options() if known is None else {*known, "--help"}):
            yield name
        else:
            yield from (f"{name} {part}" for part in refused_choices(name, value, script))


def refused_choices(name: str, value: str, script: re.Match | None) -> list[str]:
    """The parts of a value, as in `dpo|ipo`, that are no choice of the option."""
    owners = [script[1]] if script and script[1] in COMMANDS else COMMANDS
    fields = [options_of(command)[name] for command in owners if name in options_of(command)]
    kinds = [typing.get_args(f.type)[0] if typing.get_origin(f.type) is list else f.type for f in fields]
    choices = {choice for kind in kinds for choice in typing.get_args(kind)}
    is_choice = bool(kinds) and all(typing.get_origin(kind) is typing.Literal for kind in kinds)
    return [part for part in value.split("|") if part and part not in choices] if is_choice else []


@cache
def metric_patterns() -> list[re.Pattern]:
    """One pattern per metric name in the code; a group stands for each part that is filled in."""
    code = sources(".py", "common", "step1_sft", "step2_reward", "step3_ppo")
    names = set(re.findall(r"[\"']([a-z0-9_]+/[a-z0-9_{} +]+|\{[a-z]+\}/[a-z0-9_]+)[\"']", code))
    return [re.compile(re.sub(r"\\\{.*?\\\}", r"([A-Za-z0-9_]+)", re.escape(name))) for name in names]


def is_metric(name: str) -> bool:
    """Whether the code writes a metric of this name; in capitals, a part that differs from run to run."""
    code = sources(".py", "common", "step1_sft", "step2_reward", "step3_ppo")
    return any(
        all(re.fullmatch("[A-Z]+|[0-9]", part) or f'"{part}"' in code for part in match.groups())
        for match in (pattern.fullmatch(name) for pattern in metric_patterns())
        if match
    )


def is_file(name: str, page: Path) -> bool:
    """Whether a path exists, seen from the page, from the top or from any folder."""
    if any((folder / name).exists() for folder in (REPOSITORY / page.parent, REPOSITORY)):
        return True
    return any(any((REPOSITORY / folder).rglob(name)) for folder in (*FOLDERS, ".github"))


def is_output(name: str) -> bool:
    """Whether the code writes a path: each part that is not in capitals is a string, or the end of one."""
    if name.split("/")[0] in FOLDERS or re.search(r"\.(py|sh|md)$", name):
        return False
    parts = [part for part in name.split("/") if part and not re.match(r"[A-Z.~]|\d", part)]
    parts = [re.sub(r"\d+$", "", part) for part in parts]
    parts = [re.sub(r"^\w+(?=\.\w+\.)", "", part) for part in parts]  # the user's name for a file
    code = sources(".py") + sources(".sh", "launch")
    return all(re.search(rf"[\"'/}}]{re.escape(part)}[\"'/{{]", code) for part in parts)


def words(lines: list[str]) -> Iterator[str]:
    """Words that look like a path, a file or a metric."""
    text = re.sub(r"\b(OUTPUT|MODEL)=\S+", "", " ".join(lines))  # the user's folders
    for word in text.split():
        word = word.strip(",;()'\"").split(":")[0].split("=")[-1].rstrip(".")
        if re.fullmatch(rf"[\w./~-]+{EXTENSIONS}|[\w.~-]+/[\w./-]*", word) and re.search("[a-z]{2}", word):
            yield word


def trees(text: str) -> list[str]:
    """Lines of fenced blocks that begin with a folder or a file."""
    lines = [line for block in fences(text) for line in block.splitlines()]
    return [line for line in lines if re.match(rf"\s*[\w./-]+(/|{EXTENSIONS}),?(\s|$)", line)]


def missing(text: str, page: Path) -> list[str]:
    """What a page names and nobody has."""
    lines = commands(text)
    own = re.findall(rf"(?<![\w/.$-])(?:{'|'.join(FOLDERS)})/(?:[\w./-]*\w)?", text)
    absent = [path for path in own if not is_file(path, page)]
    absent += [option for line in lines for option in refused_options(line)]
    # A file of data that belongs to the user is named by an option of a command.
    values = {word.split(":")[0] for line in lines if "--" in line for word in line.split()}
    for word in [*words(spans(text)), *words(trees(text))]:
        is_data = word in values and re.search(DATA_FILE, word)
        if not (is_data or is_metric(word) or is_file(word, page) or is_output(word)):
            absent.append(word)
    links = re.findall(r"(?:\]\(|src=\"|srcset=\"|href=\")([^)\"#]+)", text)
    absent += [
        link
        for link in links
        if not link.startswith("http") and not (REPOSITORY / page.parent / link).exists()
    ]
    functions = {name for span in spans(text) for name in re.findall(r"\b(\w+)\(\)", span)}
    absent += [f"{name}()" for name in functions if not re.search(rf"\bdef {name}\(", sources(".py"))]
    names = {name for line in lines for name in re.findall(r"\b([A-Z][A-Z_]{3,})=|^([A-Z]+_[A-Z_]+)$", line)}
    variables = sources(".sh", "launch") + sources(".py")
    absent += [name for name in (a or b for a, b in names) if not re.search(rf"\b{name}\b", variables)]
    return sorted({*absent})


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_names_exists(page):
    assert missing((REPOSITORY / page).read_text(encoding="utf-8"), page) == []


def test_the_front_page_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`train/loss` and `train/los`", "train/los"),
        ("`eval/length`, `eval/lenght`", "eval/lenght"),
        ("`kl/quarter_1`, `reward/mean_NAME`, `reward/meen_NAME`", "reward/meen_NAME"),
        ("`--kl_coef` and `--kl_coeff`", "--kl_coeff"),
        ("`bash launch/step1_sft.sh --learning_rate 1 --kl_coef 1`", "--kl_coef"),
        ("```\nbash launch/step1_sft.sh \\\n  --max_lenght 3\n```", "--max_lenght"),
        ("`--loss dpo`, `--loss dop`", "--loss dop"),
        ("`--report_to wandb`, `--report_to wandbs`", "--report_to wandbs"),
        ("`bash launch/step1.sh`", "launch/step1.sh"),
        ("see `common/text/tokeniser.py` or `tokenizer.py`", "common/text/tokeniser.py"),
        ("`OUT/options.json`, `OUT/option.json`", "OUT/option.json"),
        ("[stage](step1_sft/main.py) [stage](step1_stf/main.py)", "step1_stf/main.py"),
        ("`NUM_GPUS=8 bash launch/step1_sft.sh`, `NUM_GPU`", "NUM_GPU"),
        ("`policy_loss()`, `polcy_loss()`", "polcy_loss()"),
        ("```\ncommon/   # shared\n  runtim/\n```", "runtim/"),
    ],
)
def test_a_misspelt_name_is_noticed(text, wrong):
    assert missing(text, Path("README.md")) == [wrong]
