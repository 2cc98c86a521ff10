"""Compare the SFT model and the PPO policy: table, sample answers, curves, `report.json` and `report.png`.

Both answer the same held-out prompts. The answers are scored by the reward model of PPO and by the gold rule,
which training never uses: the policy is better only if both scores rise.
"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

# As a script, this file's folder is on the path, but the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.runtime.options import reason
from launch.quickstart.world import gold_score

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGES = ("step1_sft", "step2_reward", "step3_ppo")
KINDS = (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForCausalLM)
SAMPLES_PER_PROMPT = 2
MAX_RESPONSE_LENGTH = 64
SHOWN_SAMPLES = 3
WIDEST_TABLE = 110
SEED = 0
CURVES = (
    ("reward/mean", "reward-model score", "tab:blue"),
    ("kl/mean", "KL to the SFT model (nats)", "tab:orange"),
)


class SampledAnswer(NamedTuple):
    """A sampled answer; `response_ids` end in EOS unless it was truncated."""

    prompt: str
    prompt_ids: list[int]
    response_ids: list[int]
    text: str


def read_jsonl(path: Path) -> list[dict]:
    """The records of a file."""
    if not path.exists():
        raise ValueError(f"{path} is missing: has the stage that writes it run?")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric."""
    lines = [line for line in metrics if name in line]
    if not lines:
        raise ValueError(f"no line of metrics.jsonl holds {name}")
    return [line["step"] for line in lines], [line[name] for line in lines]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[dict]]
) -> list[SampledAnswer]:
    """Sample at temperature 1, as in PPO, with the same seed for every model."""
    torch.manual_seed(SEED)
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    batch = tokenizer(
        texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
    )
    generated = model.generate(
        **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_RESPONSE_LENGTH
    )
    answers = []
    for prompt, ids, mask, row in zip(
        prompts, batch["input_ids"], batch["attention_mask"], generated.tolist(), strict=True
    ):
        response = row[len(ids) :]
        if tokenizer.eos_token_id in response:
            response = response[: response.index(tokenizer.eos_token_id) + 1]
        text = tokenizer.decode(response, skip_special_tokens=True)
        answers.append(SampledAnswer(prompt[-1]["content"], ids[mask.bool()].tolist(), response, text))
    return answers


def pad(answers: list[SampledAnswer], pad_id: int) -> tuple[Tensor, Tensor]:
    """Sequences (B, T), padded on the right, and a mask (B, T) of their tokens."""
    rows = [torch.tensor(answer.prompt_ids + answer.response_ids) for answer in answers]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


@torch.no_grad()
def response_logprobs(model: PreTrainedModel, answers: list[SampledAnswer]) -> Tensor:
    """Log-probability (B,) of each response given its prompt."""
    ids, real = pad(answers, model.config.pad_token_id)
    logprobs = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
    starts = torch.tensor([len(answer.prompt_ids) for answer in answers])
    in_response = real[:, 1:] & (torch.arange(1, ids.shape[1]) >= starts[:, None])
    return (chosen * in_response).sum(-1)


@torch.no_grad()
def reward_scores(model: PreTrainedModel, answers: list[SampledAnswer]) -> Tensor:
    """Normalised score (B,) of each answer; transformers reads it at the last token."""
    ids, real = pad(answers, model.config.pad_token_id)
    raw = model(input_ids=ids, attention_mask=real.long()).logits.squeeze(-1)
    return (raw - model.config.reward_mean) / model.config.reward_std


def distinct_2(answers: list[SampledAnswer]) -> float:
    """Distinct word pairs / word pairs, over all answers (Li et al. 2016)."""
    words = [answer.text.split() for answer in answers]
    pairs = [pair for row in words for pair in zip(row, row[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def win_rate(ours: list[float], theirs: list[float]) -> float:
    """Share of wins of the first side, without ties."""
    pairs = list(zip(ours, theirs, strict=True))
    decided = sum(a != b for a, b in pairs)
    return sum(a > b for a, b in pairs) / max(1, decided)


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def compare_checkpoints(folder: Path) -> tuple[dict, list[tuple[SampledAnswer, SampledAnswer]]]:
    """Metrics of the report, and pairs of answers of the two policies. Raises ValueError."""
    for stage in STAGES:
        if not (folder / stage / "final").is_dir():
            raise ValueError(f"{folder / stage / 'final'} is missing")
    tokenizer = AutoTokenizer.from_pretrained(folder / "step1_sft/final", trust_remote_code=False)
    sft, reward, ppo = (
        kind.from_pretrained(folder / stage / "final", trust_remote_code=False)
        for kind, stage in zip(KINDS, STAGES, strict=True)
    )
    prompts = [record["prompt"] for record in read_jsonl(folder / "world/prompts_heldout.jsonl")]
    figures: dict = {}
    answers, golds = {}, {}
    for name, model in (("sft", sft), ("ppo", ppo)):
        answers[name] = sample_answers(model, tokenizer, prompts * SAMPLES_PER_PROMPT)
        golds[name] = [gold_score(answer.prompt, answer.text) for answer in answers[name]]
        figures[f"reward_{name}"] = reward_scores(reward, answers[name]).mean().item()
        figures[f"gold_{name}"] = mean(golds[name])
        figures[f"length_{name}"] = mean([len(answer.response_ids) for answer in answers[name]])
        figures[f"distinct_2_{name}"] = distinct_2(answers[name])
    log_ratio = response_logprobs(ppo, answers["ppo"]) - response_logprobs(sft, answers["ppo"])
    figures["kl"] = log_ratio.mean().item()
    figures["gold_win_rate"] = win_rate(golds["ppo"], golds["sft"])
    _, accuracies = series(read_jsonl(folder / "step2_reward/metrics.jsonl"), "eval/accuracy")
    figures["reward_accuracy"] = accuracies[-1]
    return figures, list(zip(answers["sft"], answers["ppo"], strict=True))


def plot(metrics: list[dict], path: Path) -> None:
    """Plot reward (above) and KL to the SFT model (below) over PPO steps."""
    figure, panels = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    figure.suptitle("PPO: reward gained, and distance from the SFT model")
    for axes, (name, label, colour) in zip(panels, CURVES, strict=True):
        axes.plot(*series(metrics, name), color=colour, linewidth=1.8)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("PPO step")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(figures: dict) -> str:
    """Metrics before and after PPO, one per line."""
    rows = [
        ("reward-model score", f"{figures['reward_sft']:.2f}", f"{figures['reward_ppo']:.2f}"),
        ("gold score (best 1)", f"{figures['gold_sft']:.2f}", f"{figures['gold_ppo']:.2f}"),
        ("KL to the SFT model", "0", f"{figures['kl']:.2f}"),
        ("response length (tokens)", f"{figures['length_sft']:.1f}", f"{figures['length_ppo']:.1f}"),
        ("distinct-2 of all answers", f"{figures['distinct_2_sft']:.3f}", f"{figures['distinct_2_ppo']:.3f}"),
    ]
    lines = [f"{name:<28}{before:>10}{after:>10}" for name, before, after in (("", "SFT", "PPO"), *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def side_by_side(before: SampledAnswer, after: SampledAnswer, width: int) -> str:
    """A prompt, and below it the two answers with their gold scores in two columns."""
    column = (width - 3) // 2
    cells = [
        textwrap.wrap(f"{name} (gold {gold_score(answer.prompt, answer.text):.2f}): {answer.text}", column)
        for name, answer in (("SFT", before), ("PPO", after))
    ]
    height = max(map(len, cells))
    left, right = (cell + [""] * (height - len(cell)) for cell in cells)
    return "\n".join(
        [f"> {before.prompt}", *(f"{a:<{column}} | {b}" for a, b in zip(left, right, strict=True))]
    )


def main() -> None:
    """Compare, write report.json and report.png, print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quickstart_dir", type=Path, default=Path("output/quickstart"), help="where the runs are"
    )
    parser.add_argument("--seconds", type=float, nargs=3, default=(), help="wall clock of steps 1, 2 and 3")
    options = parser.parse_args()
    disable_progress_bar()
    folder = options.quickstart_dir
    try:
        figures, pairs = compare_checkpoints(folder)
    except Exception as error:  # noqa: BLE001 - libraries raise anything for a folder without runs
        print(f"error: {folder}: not a finished quickstart: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    figures["seconds"] = dict(zip(STAGES, options.seconds, strict=False))
    figures["checkpoints"] = {stage: str(folder / stage / "final") for stage in STAGES}
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    plot(read_jsonl(folder / "step3_ppo/metrics.jsonl"), folder / "report.png")
    print(f"\nHeld-out prompts, {len(pairs)} answers by each policy\n\n{table(figures)}\n")
    print(f"PPO's answer has the higher gold score in {figures['gold_win_rate']:.0%} of pairs without a tie.")
    print(f"The reward model ranks {figures['reward_accuracy']:.0%} of held-out pairs as the raters did.")
    width = min(WIDEST_TABLE, shutil.get_terminal_size().columns)
    for before, after in pairs[:SHOWN_SAMPLES]:
        print(f"\n{side_by_side(before, after, width)}")
    print(f"\nCurves: {folder / 'report.png'}    figures: {folder / 'report.json'}")
    for stage, path in figures["checkpoints"].items():
        print(f"{stage:<14}{path}")


if __name__ == "__main__":
    main()
