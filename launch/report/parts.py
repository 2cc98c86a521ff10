"""Parts of the page as HTML: cards, tables, pictures, samples, options. Texts of runs are escaped."""

import base64
import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from common.runtime.options import reason
from launch.report.curves import Picture
from launch.report.read import Line, Run, columns
from launch.report.rule import Finding

# Metrics of the first table, their meaning, and the function that selects the best value, if any.
FIGURES: dict[str, tuple[str, Callable[[list[float]], float] | None]] = {
    "train/loss": ("training loss", min),
    "eval/loss": ("loss on held-out data", min),
    "eval/perplexity": ("perplexity on held-out data", min),
    "train/accuracy": ("share of training pairs ranked as labelled", max),
    "eval/accuracy": ("share of held-out pairs ranked as labelled", max),
    "reward/mean": ("score of a response", max),
    "eval/score": ("score on held-out prompts", max),
    "eval/gold": ("gold score on held-out prompts", max),
    "kl/mean": ("KL to the reference, nats per response", None),
    "eval/kl": ("KL on held-out prompts", None),
    "policy/entropy": ("entropy, nats per token", None),
    "policy/clip_fraction": ("share of tokens whose update was clipped", None),
    "value/explained_var": ("share of the variance of returns that the critic predicts", max),
    "response/length": ("length in tokens", None),
    "response/eos_rate": ("share of responses that end in EOS", None),
    "response/distinct_2": ("share of distinct pairs of tokens", None),
    "response/repeated_3": ("share of repeated trigrams", None),
    "time/step": ("seconds per step", None),
    "train/tokens_per_second": ("tokens per second in training", None),
    "rollout/tokens_per_second": ("tokens per second in sampling", None),
    "memory/peak_gib": ("peak memory of one rank", None),
}
SHOWN_PROMPTS = 10


def cards(texts: Sequence[str], kind: str) -> str:
    return "".join(f'<div class="finding {kind}"><p>{escape(text)}</p></div>\n' for text in texts)


def findings(findings: Sequence[Finding]) -> str:
    cards = [f"<p>{escape(one.problem)}</p><p><b>Try:</b> {escape(one.advice)}</p>" for one in findings]
    return "".join(f'<div class="finding">{card}</div>\n' for card in cards)


def figures(run: Run) -> str:
    rows = []
    for name, (meaning, best_of) in FIGURES.items():
        steps, values = columns(run.lines, "step", name)
        if values:
            index = values.index(best_of(values)) if best_of else None
            best = "" if index is None else f"{_number(values[index])} (step {steps[index]})"
            rows.append([name, meaning, _number(values[0]), best, _number(values[-1])])
    return _table(["metric", "", "start", "best", "end"], rows, "numbers") if rows else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def gallery(pictures: Sequence[Picture], is_wide: bool = False) -> str:
    """Pictures side by side, or large ones with captions."""
    figures = []
    for picture in pictures:
        content = base64.b64encode(picture.path.read_bytes()).decode()
        caption = f"<figcaption>{escape(picture.alt)}</figcaption>" if is_wide else ""
        image = f'<img src="data:image/png;base64,{content}" alt="{escape(picture.alt)}">'
        figures.append(f"<figure>{image}{caption}</figure>\n")
    return f'<div class="{"wide" if is_wide else "gallery"}">{"".join(figures)}</div>'


def samples(samples: Sequence[Line]) -> str:
    """The first prompts with their responses at the first and the last step side by side."""
    all_steps = sorted({sample["step"] for sample in samples})
    steps = dict.fromkeys([*all_steps[:1], *all_steps[-1:]])  # may be the same
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples if sample["step"] in steps))
    shown = []
    for prompt in prompts[:SHOWN_PROMPTS]:
        responses = [[s for s in samples if (s["step"], s["prompt"]) == (step, prompt)] for step in steps]
        for side_by_side in zip(*responses, strict=False):
            head = f'<p class="label">Prompt</p><p class="text prompt">{escape(prompt.strip())}</p>'
            pair = "".join(map(_response, side_by_side))
            shown.append(f'<div class="sample">{head}<div class="pair">{pair}</div></div>')
    if len(prompts) > SHOWN_PROMPTS:
        shown.append(f'<p class="soft">{SHOWN_PROMPTS} of {len(prompts)} prompts in samples.jsonl.</p>')
    return "\n".join(shown)


def _response(sample: Line) -> str:
    facts = [f"step {sample['step']}"]
    facts += [f"{name} {sample[name]:.3g}" for name in ("score", "gold") if name in sample]
    facts += [f"{sample['length']} tokens", *["truncated"] * (not sample["ended"])]
    label = f'<p class="label">{escape(" · ".join(facts))}</p>'
    return f'<div>{label}<p class="text">{escape(sample["response"].strip())}</p></div>'


def golden(run: Run) -> str:
    """Accuracy of a reward model on the golden pairs, and the verdicts of step 2."""
    try:
        return _golden_parts(run)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        path = run.folder / "golden/report.json"
        return cards([f"{path}: not a report of step 2: {reason(error)}."], "absent")


def _golden_parts(run: Run) -> str:
    groups = [("pairs", "all", run.golden["accuracy"])]
    for kind, members in run.golden["accuracy_by"].items():
        groups += [(f"by {kind}", name, one) for name, one in members.items()]
    rows = [
        [kind, name, str(one["pairs"]), f"{one['accuracy']:.1%}", f"{one['low']:.1%} to {one['high']:.1%}"]
        for kind, name, one in groups
    ]
    verdicts = [Finding(one["found"], one["advice"]) for one in run.golden["verdicts"]]
    paths = sorted((run.folder / "golden").glob("*.png"))
    pictures = [Picture(path, f"Golden pairs: {path.stem} of the reward model") for path in paths]
    parts = [findings(verdicts), _table(["", "", "pairs", "accuracy", "95% interval"], rows, "numbers")]
    return "\n".join([*parts, gallery(pictures) if pictures else ""])


def options(run: Run) -> str:
    """Options that differ from their defaults; the others are folded. Options on no command line in train.log
    were adjusted by the run.
    """
    changed, adjusted, same = [], [], []
    for name, value in run.options.items():
        default, meaning = run.known.get(name, (None, "not an option of this version"))
        if value == default:
            same.append([f"--{name}", _show(value), meaning])
        else:
            rows = changed if run.given is None or name in run.given else adjusted
            rows.append([f"--{name}", _show(value), _show(default), meaning])
    folded = f"<summary>{len(same)} options at their defaults</summary>"
    folded += _table(["option", "value", "meaning"], same)
    heads = ["option", "value", "default", "meaning"]
    by_run = "<h4>Adjusted by the run, to the model or to other options</h4>" + _table(heads, adjusted)
    return _table(heads, changed) + by_run * bool(adjusted) + f"<details>{folded}</details>"


def _show(value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls if it is wide. Cells are escaped; the first of each row is code."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f"<tr><td><code>{escape(first)}</code></td>{cells}</tr>")
    return f'<div class="scroll"><table class="{kind}">\n{chr(10).join(lines)}\n</table></div>'
