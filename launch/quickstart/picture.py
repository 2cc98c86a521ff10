"""Draw the picture of README.md from a finished quickstart: the pipeline beside the curve of the PPO run.

python launch/quickstart/picture.py --quickstart_dir output/quickstart --output_dir .github
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

# Run as a script, Python looks for modules beside this file only.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.runtime.options import reason
from launch.quickstart.report import read_jsonl, series

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

# GitHub's colours: text, thin lines, boxes of data, boxes of steps, the reward model, the gold rule.
THEMES = {
    "light": {
        "ink": "#1f2328", "line": "#818b98", "data": "#f6f8fa", "step": "#ddf4ff", "reward": "#0969da",
        "gold": "#9a6700",
    },
    "dark": {
        "ink": "#f0f6fc", "line": "#9198a1", "data": "#212830", "step": "#12305c", "reward": "#4493f8",
        "gold": "#d29922",
    },
}  # fmt: skip
COLUMNS = (
    ("demonstrations", "Step 1", "supervised\nfine-tuning", "SFT model"),
    ("preferences", "Step 2", "reward\nmodelling", "reward model"),
    ("prompts", "Step 3", "PPO", "aligned model"),
)
WIDTH, GAP = 2.2, 0.75
DATA, STEP, MODEL = (5.0, 0.9), (2.35, 1.8), (0.35, 0.9)  # bottom and height of the boxes in each row


def draw_box(axes: Axes, column: int, row: tuple[float, float], fill: str, edge: str) -> tuple[float, float]:
    """A rounded box of the pipeline; returns its centre."""
    left, (bottom, height) = column * (WIDTH + GAP), row
    shape = "round,pad=0,rounding_size=0.2"
    axes.add_patch(
        FancyBboxPatch((left, bottom), WIDTH, height, shape, facecolor=fill, edgecolor=edge, linewidth=1.2)
    )
    return left + WIDTH / 2, bottom + height / 2


def draw_arrow(axes: Axes, theme: dict[str, str], *points: tuple[float, float]) -> None:
    """An arrow along the points."""
    axes.plot(*zip(*points, strict=True), color=theme["line"], linewidth=1.3, solid_joinstyle="round")
    style = {"arrowstyle": "-|>", "color": theme["line"], "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def draw_pipeline(axes: Axes, theme: dict[str, str]) -> None:
    """Three columns: the data, the step that reads them, and the model that it writes."""
    axes.set(xlim=(-0.05, 3 * WIDTH + 2 * GAP + 0.05), ylim=(-0.05, 6.0))
    axes.axis("off")
    centred = {"ha": "center", "va": "center", "color": theme["ink"]}
    for column, (data, step, method, model) in enumerate(COLUMNS):
        axes.text(*draw_box(axes, column, DATA, theme["data"], theme["line"]), data, fontsize=10, **centred)
        axes.text(*draw_box(axes, column, MODEL, theme["data"], theme["line"]), model, fontsize=10, **centred)
        x, y = draw_box(axes, column, STEP, theme["step"], theme["reward"])
        top = y + STEP[1] / 2
        axes.text(x, top - 0.42, step, fontsize=11, fontweight="bold", **centred)
        axes.text(x, top - 1.13, method, fontsize=10, linespacing=1.25, **centred)
        draw_arrow(axes, theme, (x, DATA[0]), (x, top))
        draw_arrow(axes, theme, (x, STEP[0]), (x, sum(MODEL)))
        if column < 2:
            right, level, turn = x + WIDTH / 2, MODEL[0] + MODEL[1] / 2, x + WIDTH / 2 + GAP / 3
            draw_arrow(axes, theme, (right, level), (turn, level), (turn, y), (right + GAP, y))
    # The SFT model is the actor and the reference of step 3 too.
    first, bottom, left = WIDTH / 2, 0.0, 2 * (WIDTH + GAP)
    turn, low = left - GAP / 3, STEP[0] + 0.35
    draw_arrow(axes, theme, (first, MODEL[0]), (first, bottom), (turn, bottom), (turn, low), (left, low))


def draw_curve(axes: Axes, metrics: list[dict], figures: dict, theme: dict[str, str]) -> None:
    """The reward-model score during PPO, and the gold score of held-out answers before and after."""
    steps, scores = series(metrics, "reward/mean")
    axes.plot(steps, scores, color=theme["reward"], linewidth=2)
    held_out_steps, held_out_scores = series(metrics, "eval/score")
    axes.plot(held_out_steps, held_out_scores, "o", color=theme["reward"], markersize=5)
    ends, gold = (0, steps[-1]), (figures["gold_sft"], figures["gold_ppo"])
    axes.plot(ends, gold, "o--", color=theme["gold"], linewidth=1.3, markersize=6)
    for x, y, align in zip(ends, gold, ("left", "right"), strict=True):
        axes.annotate(
            f"{y:.2f}", (x, y), (0, 7 if align == "left" else -15), textcoords="offset points", ha=align,
            color=theme["gold"], fontsize=10, fontweight="bold",
        )  # fmt: skip
    middle = steps[-1] / 2
    axes.text(
        middle, max(scores) + 0.12, "reward model (PPO's objective)", color=theme["reward"], ha="center"
    )
    label = "gold rule, before and after\n(never trained on)"
    axes.text(middle + 6, 0.42, label, color=theme["gold"], ha="center", va="top")
    axes.set_xlabel("PPO step", color=theme["ink"])
    axes.set_ylabel("score", color=theme["ink"])
    axes.set_title("Result of launch/quickstart.sh", color=theme["ink"], fontsize=11)
    axes.set_ylim(top=max(scores) + 0.4)
    axes.tick_params(colors=theme["ink"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme["line"])


def draw(metrics: list[dict], figures: dict, theme: dict[str, str], path: Path) -> None:
    """Write the picture in the colours of one theme."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.4), width_ratios=(1.35, 1), layout="constrained"
    )
    figure.get_layout_engine().set(wspace=0.06)
    draw_pipeline(left, theme)
    draw_curve(right, metrics, figures, theme)
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    """Parse the options, and write a picture for each theme of GitHub."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quickstart_dir", type=Path, default=Path("output/quickstart"), help="the runs")
    parser.add_argument("--output_dir", type=Path, default=Path(".github"), help="folder for the pictures")
    options = parser.parse_args()
    matplotlib.rcParams["svg.hashsalt"] = "quickstart"  # the same runs give the same bytes
    folder = options.quickstart_dir
    try:
        metrics = read_jsonl(folder / "step3_ppo/metrics.jsonl")
        figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"error: {folder}: not a finished quickstart: {reason(error)}", file=sys.stderr)
        sys.exit(2)
    for name, theme in THEMES.items():
        draw(metrics, figures, theme, options.output_dir / f"quickstart_{name}.svg")


if __name__ == "__main__":
    main()
