"""The report on runs: what it finds in healthy and sick curves, and that the page holds what runs left."""

import dataclasses
import json
import math
import random
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common.options import UserError
from launch.report.curves import draw_panel, draw_trade, panels
from launch.report.findings import findings
from launch.report.hacks import not_looked_at, over_optimisation
from launch.report.main import write_report
from launch.report.read import columns, find_runs, known_options
from launch.report.trends import ends, error_of_change, peak, running_means
from step1_sft.options import SFTOptions
from step2_reward.options import RewardOptions
from step3_ppo.options import PPOOptions
from tests.conftest import REPOSITORY

STEPS, EVALUATIONS = 60, 15


def towards(start: float, end: float, noise: float, count: int = STEPS) -> list[float]:
    """A curve that levels off, with seeded noise."""
    draw = random.Random(f"{start} {end}")
    shape = (1 - math.exp(-5 * i / count) for i in range(count))
    return [start + (end - start) * part + draw.gauss(0, noise) for part in shape]


HEALTHY = {
    "reward/mean": towards(-0.5, 1.2, 0.05),
    "kl/mean": towards(0, 4, 0.05),
    "policy/entropy": towards(2, 1, 0.02),
    "policy/clip_fraction": towards(0.15, 0.02, 0.01),
    "value/explained_var": towards(-0.3, 0.8, 0.05),
    "response/length": towards(30, 35, 1),
    "response/eos_rate": towards(0.8, 0.95, 0.01),
    "response/distinct_2": towards(0.97, 0.93, 0.01),
    "response/repeated_3": towards(0.01, 0.03, 0.005),
    "eval/score": towards(-0.5, 1.2, 0.03, EVALUATIONS),
    "eval/gold": towards(0.2, 0.7, 0.03, EVALUATIONS),
    "eval/kl": towards(0, 5, 0.1, EVALUATIONS),
    "eval/distinct_2": towards(0.97, 0.93, 0.01, EVALUATIONS),
    "eval/nll_chosen": towards(2.0, 2.05, 0.002, EVALUATIONS),
}


def logged(curves: dict[str, list[float]]) -> list[dict]:
    """Lines as a run writes them: figures of training at every step, of evaluations in lines of their own."""
    lines = []
    for prefix in (True, False):
        chosen = {name: values for name, values in curves.items() if name.startswith("eval/") is prefix}
        every = STEPS // EVALUATIONS if prefix else 1
        for i in range(max(map(len, chosen.values()), default=0)):
            found = {name: values[i] for name, values in chosen.items() if i < len(values)}
            lines.append({"step": (i + 1) * every, **found})
    return sorted(lines, key=lambda line: line["step"])


SICK = {
    "Over-optimisation: around step 20 ": {
        "eval/gold": [0.2 + 0.16 * i if i < 5 else 0.9 - 0.04 * i for i in range(EVALUATIONS)]
    },
    "Score and length rise together": {"response/length": towards(30, 60, 1)},
    "Repetition: response/repeated_3 went from": {"response/repeated_3": towards(0.01, 0.3, 0.005)},
    "Repetition": {"response/distinct_2": towards(0.97, 0.7, 0.01)},
    "Collapsed entropy": {"policy/entropy": towards(2, 0.05, 0.002)},
    "Collapsed variety": {"eval/distinct_2": towards(0.97, 0.3, 0.01, EVALUATIONS)},
    "Responses do not end any more": {"response/eos_rate": [0.9] * 20 + [0.002] * 40},
    "Nothing is learnt: kl/mean is 0.0": {
        "reward/mean": [random.Random(i).gauss(0, 0.1) for i in range(STEPS)],
        "kl/mean": towards(0, 0.02, 0.001),
    },
    "A jump of KL: kl/mean went from 1.00 to 4.50 nats between steps 30 and 33.": {
        "kl/mean": [1.0] * 30 + [2.2, 3.4, 4.5] + [4.4] * 27
    },
    "Drifted far: kl/mean exceeds 20 nats from step 53 ": {"kl/mean": [0.39 * i for i in range(STEPS)]},
    "The chosen is unlearnt too: eval/nll_chosen rose from 2 to 2.2": {"eval/nll_chosen": [2.0, 2.1, 2.2]},
    "The critic does not learn": {"value/explained_var": towards(-0.1, -0.2, 0.05)},
    "Updates too large: policy/clip_fraction is 0.4": {"policy/clip_fraction": [0.4] * 16 + [0.0] * 44},
}


def test_a_healthy_run_has_no_finding():
    assert findings(logged(HEALTHY)) == []
    assert findings([]) == findings([{"step": 1, "train/loss": None}]) == []
    assert columns([{"a": math.nan, "b": 1}, {"a": 1}, {"a": 2, "b": 3}], "a", "b") == [[2], [3]]


@pytest.mark.parametrize("found", SICK)
def test_one_trouble_one_finding(found):
    (finding,) = findings(logged(HEALTHY | SICK[found]))
    assert finding.found.startswith(found) and finding.found.endswith(".")
    assert finding.advice.endswith(".")
    known = {name for options in known_options().values() for name in options}
    assert set(re.findall(r"--(\w+)", finding.advice)) <= known


@pytest.mark.parametrize(
    "changes",
    [
        SICK["Over-optimisation: around step 20 "] | {"eval/score": towards(1.2, -0.5, 0.03, EVALUATIONS)},
        {"response/length": [30.0] * 48 + [60.0] * 12},  # long after the score has risen
        {"response/eos_rate": [0.0] * STEPS},  # no response ever ended
        {"kl/mean": [*[0.35 * i for i in range(18)], *[4.2, 6.6, 5.0, 6.4] * 11]},  # swings at its level
        {"reward/mean": [random.Random(i).gauss(0, 0.1) for i in range(STEPS)]},  # flat, but KL is not small
    ],
)
def test_half_a_trouble_is_none(changes):
    assert findings(logged(HEALTHY | changes)) == []


@pytest.mark.parametrize("scores", [[0.0, 1.0], [1.0, 0.0]], ids=["rises", "falls"])
def test_repetition_is_told_with_the_score(scores):
    lines = [
        {"step": step, "response/repeated_3": share, "reward/mean": score}
        for step, (share, score) in enumerate(zip([0.0, 0.4], scores, strict=True))
    ]
    (finding,) = findings(lines)
    assert ("while the score rose from 0 to 1." in finding.found) == (scores == [0.0, 1.0])
    assert ("did not ask for it" in finding.advice) == (scores == [1.0, 0.0])


ANSWERS = [f"{word} {word}s can be found in many {word} places" for word in "abcdefgh"]
CHANGED = [f"{word} ones may be found in all {word} towns" for word in "abcdefgh"]
SAME = "This is the one answer to all that you may ask"


@pytest.mark.parametrize(
    ("after", "score", "parts"),
    [
        (CHANGED, 1.0, []),
        ([SAME] * 8, 1.0, ["from 0 to 1", "100% of the samples at step 9 begin with “This is", "to 12%"]),
        ([SAME] * 8, -1.0, []),
        ([SAME] * 5 + CHANGED[5:], 1.0, ["62%", "12% began alike"]),
        ([f"As you ask: {answer}" for answer in ANSWERS], 1.0, ["100%", "“As you ask:”"]),
        ([f"{i} {SAME}" for i in range(8)], 1.0, ["12%"]),  # the same but for their beginning
        ([SAME] * 4 + CHANGED[4:], 1.0, []),
    ],
)  # fmt: skip
def test_answers_that_become_alike(after, score, parts):
    lines = [{"step": 0, "eval/score": 0.0}, {"step": 9, "eval/score": score}]
    told = [{"step": 0, "response": one} for one in ANSWERS] + [{"step": 9, "response": one} for one in after]
    found = findings(lines, told)
    assert len(found) == bool(parts) and all(part in found[0].found for part in parts)
    assert not findings(lines, [one for one in told if one["step"] == 9])
    assert not findings(lines, [*told[:3], *told[8:11]]), "three tell nothing"


def test_what_was_not_looked_at_is_said():
    """Each with its reason and the option that would show it; nothing of a run that is no PPO."""
    trained = [{"step": 1, "reward/mean": 0.0, "kl/mean": 0.0}]
    scored = [*trained, {"step": 1, "eval/score": 0.0}]
    golden = [{"step": step, "eval/score": 0.0, "eval/gold": 0.0} for step in range(5)]
    samples = [{"step": step, "response": ""} for step in (0, 5) for _ in range(4)]
    for lines, kept, options in (
        ([{"step": 1, "train/loss": 0.0}], [], []),
        (trained, [], [["eval_fraction", "eval_data", "eval_steps"]]),
        (scored, samples, [["gold_reward_model", "gold_function"]]),
        (trained + golden[:4], samples, [["eval_steps"]]),
        (trained + golden, samples, []),
        (trained + golden, [], [["num_samples"]]),
        (trained + golden, samples[2:], [["num_samples"]]),
        (trained + golden, samples[:4], [["eval_steps"]]),
        (scored, samples[:4], [["gold_reward_model", "gold_function"], ["eval_steps"]]),
    ):
        said = not_looked_at(lines, kept)
        assert [re.findall(r"--(\w+)", text) for text in said] == options
        assert all(text.startswith("Not looked at: ") and text.endswith(".") for text in said)


@pytest.mark.parametrize(
    ("trained", "held_out", "is_overfitting"),
    [
        ([3, 2, 1.5, 1.2, 1, 0.8], [2.5, 2, 1.9, 2, 2.2, 2.4], True),
        ([3, 2, 1.5, 1.2, 1, 0.8], [2.5, 2, 1.9, 1.88, 1.87, 1.9], False),  # within 5 %
        ([3, 2, 1.5, 2.5, 2.8, 3], [2.5, 2, 1.9, 2, 2.2, 2.4], False),  # both rise: it diverges
        ([3, 2, 1.5, 1.2, 1, 0.8], [2, 2.5], True),
        ([3], [2.5], False),
    ],
)
def test_overfitting(trained, held_out, is_overfitting):
    lines = [{"step": step, "train/loss": loss} for step, loss in enumerate(trained, start=1)]
    lines += [{"step": step, "eval/loss": loss} for step, loss in enumerate(held_out, start=1)]
    found = [finding.found.split(":")[0] for finding in findings(lines)]
    assert found == ["Overfitting"] * is_overfitting


@pytest.mark.parametrize(
    ("farthest", "lowest", "highest"),
    [(1.0, 0.0, 0.05), (2.0, 0.95, 1.0), (0.0, 0.0, 0.1)],
    ids=["ends at its peak", "goes on", "flat"],
)
def test_over_optimisation_is_told_from_noise(farthest, lowest, highest):
    """Gold over the root of KL d as in Gao et al. 2023, d (a - b log d), here with its peak of 1 at d = 1."""
    alarms = 0
    for seed in range(300):
        draw = random.Random(seed)
        distances = [farthest * (i + 1) / 20 for i in range(20)]
        golds = [(d * (1 - math.log(d)) if d else 0.5) + draw.gauss(0, 0.04) for d in distances]
        alarms += over_optimisation(range(20), range(20), golds) is not None
    assert lowest <= alarms / 300 <= highest


@pytest.mark.parametrize("count", [1, 4, 5, 7, 60])
def test_running_means_and_their_peak(count):
    values = np.random.default_rng(count).normal(size=count)
    width = max(1, count // 5)
    expected = np.convolve(values, np.ones(width) / width, mode="valid")
    np.testing.assert_allclose(running_means(values.tolist()), expected, atol=1e-12)
    np.testing.assert_allclose(ends(values.tolist()), [values[:width].mean(), values[-width:].mean()])
    place, top = peak(values.tolist()), int(expected.argmax())
    assert top <= place < top + width


def test_the_error_of_a_change_is_that_of_many_curves():
    """A trend adds nothing to it, and one jump little."""
    draw = np.random.default_rng(0)
    curves = draw.normal(0, 0.3, (2000, 100)) + np.linspace(0, 50, 100)
    changes = curves[:, -20:].mean(1) - curves[:, :20].mean(1)
    curves[:, 50:] += 7
    errors = [error_of_change(curve.tolist()) for curve in curves]
    assert np.mean(errors) == pytest.approx(changes.std(), rel=0.1)
    assert error_of_change([1, 2, 3, 4]) == math.inf


def test_every_metric_has_one_panel():
    names = [
        *HEALTHY,
        "train/loss",
        "eval/loss",
        "reward/mean_2",
        "kl/quarter_1",
        "reward/p10",
        "new/one",
    ]
    shown = list(panels(names))
    assert sorted(name for _, _, names in shown for name in names) == sorted(names)
    assert ("Learning", "Loss", ["train/loss", "eval/loss"]) in shown
    assert shown[-1] == ("Others", "new/one", ["new/one"])


def test_pictures_show_the_metrics():
    lines = logged(HEALTHY)
    lines[0]["reward/mean"] = None  # not finite
    names = ["reward/mean", "reward/p10", "reward/p90"]
    for line in lines:
        line |= {"reward/p10": -9.0, "reward/p90": 9.0} if "reward/mean" in line else {}
    figure, alt = draw_panel("Score", names, lines)
    (drawn,) = figure.axes[0].lines
    assert drawn.get_xydata().tolist() == [
        list(pair) for pair in zip(*columns(lines, "step", names[0]), strict=True)
    ]
    assert figure.axes[0].collections[0].get_datalim(figure.axes[0].transData).intervaly.tolist() == [-9, 9]
    assert alt.startswith("Score: reward/mean from ") and "at step 2 to" in alt


def test_gold_is_drawn_over_the_root_of_kl():
    lines = logged(HEALTHY | SICK["Over-optimisation: around step 20 "])
    figure, alt = draw_trade(lines)
    kls, scores, golds = columns(lines, "eval/kl", "eval/score", "eval/gold")
    for axes, values in zip(figure.axes, (scores, golds), strict=True):
        curve, peak_line = axes.lines
        np.testing.assert_allclose(curve.get_xdata() ** 2, np.maximum(kls, 0))
        assert curve.get_ydata().tolist() == values
        assert peak_line.get_xdata()[0] ** 2 == pytest.approx(kls[4]), (
            "the largest mean of three is around it"
        )
    assert "Gold peaks around step 20: 0.84" in alt


class Page(HTMLParser):
    """What a page holds; fails where tags do not match."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict]] = []
        self.text, self.folded = "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data * ("style" not in self.open)
        self.folded += data * ("details" in self.open)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def write_run(folder: Path, options, curves: dict[str, list[float]]) -> None:
    folder.mkdir(parents=True)
    (folder / "options.json").write_text(json.dumps(dataclasses.asdict(options)))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logged(curves)))


def sample(step: int, response: str, **others) -> dict:
    told = {"step": step, "prompt": "<b>Why & how?</b>", "response": response, "score": 0.5 * step}
    return told | {"length": 7, "ended": step == 0} | others


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of three steps, one without evaluations."""
    folder = tmp_path_factory.mktemp("out") / "<out>"
    write_run(folder / "step1_sft", SFTOptions(seed=7), {"train/loss": towards(2, 1, 0.01)})
    write_run(
        folder / "step2_reward",
        RewardOptions(golden_data=["<g>.jsonl"]),
        {"train/loss": [0.7, 0.6, 0.5], "train/accuracy": [0.5, 0.75, 0.625]},
    )
    write_run(
        folder / "step3_ppo", PPOOptions(kl_coef=0.123), HEALTHY | SICK["Over-optimisation: around step 20 "]
    )
    part = {"pairs": 40, "accuracy": 0.7, "low": 0.5, "high": 0.8}
    said = [{"found": "Low <accuracy>.", "advice": "better labels."}]
    golden = {"accuracy": part, "accuracy_by": {"source": {"a": part}}, "verdicts": said}
    (folder / "step2_reward/golden").mkdir()
    (folder / "step2_reward/golden/report.json").write_text(json.dumps(golden))
    samples = [
        sample(0, "<script>alert(1)</script>"),
        sample(30, "middle\u2028"),
        sample(60, "at last", gold=0.25),
    ]
    lines = [json.dumps(one, ensure_ascii=False) for one in samples]
    (folder / "step3_ppo/samples.jsonl").write_text("\n".join([*lines, '{"st']))
    write_report(folder)
    return folder


def test_the_page_is_whole_and_needs_nothing_else(pipeline):
    page = Page(pipeline / "report.html")
    assert not {"script", "link"} & {tag for tag, _ in page.found}
    assert all(
        image["src"].startswith("data:image/png;base64,iVBOR") and image["alt"] for image in page.all("img")
    )
    assert not any("://" in str(value) for _, attributes in page.found for value in attributes.values())
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    links = [link["href"] for link in page.all("a")]
    assert len(ids) == len(set(ids)) and {f"#{one}" for one in ids} == set(links)
    pictures = list((pipeline / "report").rglob("*.png"))
    assert len(page.all("img")) == len(pictures) == 1 + 2 + len(list(panels(list(HEALTHY)))) + 1
    for title in ("Step 1: supervised", "Step 2: reward model", "Step 3: PPO"):
        assert title in page.text


def test_the_page_says_what_runs_left(pipeline):
    page = Page(pipeline / "report.html")
    for text in (
        "Over-optimisation: around step 20 gold was 0.74 and fell to 0.38",
        "Nothing stands out",
        "Not looked at: answers that become alike, as an evaluation kept fewer than 4",
        "Low <accuracy>.",
        "50.0% to 80.0%",
        "0.75 (step 2)",
        "<b>Why & how?</b>",
        "<script>alert(1)</script>",
        "step 60 · score 30 · gold 0.25 · 7 tokens · cut off",
        "at last",
    ):
        assert text in page.text, text
    assert "middle" not in page.text
    assert "absent" not in page.text
    assert "--kl_coef0.1230.05" in page.text
    assert "--kl_coef0.123" not in page.folded and "--temperature" in page.folded


def test_what_is_absent_is_said(tmp_path):
    write_run(tmp_path / "run", PPOOptions(), {})
    (tmp_path / "run/metrics.jsonl").unlink()
    text = Page(write_report(tmp_path / "run")).text
    assert "metrics.jsonl is absent" in text and "samples.jsonl is absent" in text
    assert "No step has been logged." in text and "Nothing stands out" not in text
    (tmp_path / "run/options.json").unlink()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n')
    text = Page(write_report(tmp_path / "run")).text
    assert "options.json is absent" in text and "samples.jsonl" not in text and "2.5" in text


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "elsewhere")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl:2: not valid JSON"):
        find_runs(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    command = ["bash", str(REPOSITORY / "launch/report.sh"), "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: .: no run here") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
