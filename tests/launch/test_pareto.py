"""The picture of runs with the same objectives and other weights."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from launch.report.main import write_report
from launch.report.pareto import Point, draw_pair, front
from launch.report.scan import scan
from step3_ppo.options import PPOOptions
from tests.launch.test_report import HEALTHY, Page, write_run


def test_the_front_is_what_no_point_dominates():
    points = [(0.0, 3.0), (1.0, 2.0), (1.0, 1.0), (2.0, 2.0), (3.0, -1.0), (2.0, 2.0), (-1.0, 3.0)]
    assert front(points) == [0, 3, 5, 4]
    draw = np.random.default_rng(0).normal(size=(60, 2))
    expected = {
        number for number, point in enumerate(draw)
        if not any((other >= point).all() and (other > point).any() for other in draw)
    }  # fmt: skip
    undominated = front([*map(tuple, draw.tolist())])
    assert {*undominated} == expected and 2 < len(expected) < 30
    heights = draw[undominated]
    assert (np.diff(heights[:, 0]) > 0).all() and (np.diff(heights[:, 1]) < 0).all()


def test_a_pair_shows_every_run_the_front_and_the_start():
    ends = [(0.0, 3.0), (1.0, 1.0), (2.0, 2.0)]
    points = [
        Point(f"1 : {weight}", {"1": -1.0, "brief": -2.0}, {"1": across, "brief": up})
        for weight, (across, up) in enumerate(ends)
    ]
    figure, alt = draw_pair(points, "1", "brief")
    (axes,) = figure.axes
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[0, 3], [2, 2]]
    start, dominated = (collection.get_offsets().tolist() for collection in axes.collections)
    assert start == [[-1, -2]] and dominated == [[1, 1]]
    assert [text.get_text() for text in axes.texts] == ["1 : 0", "1 : 1", "1 : 2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("eval/score_1", "eval/score_brief")
    assert "of 3 runs" in alt and "1 : 0: 0 and 3; 1 : 2: 2 and 2." in alt


def write(folder: Path, names: list[str], **options: object) -> None:
    judges = [f"f.py:{name}:0.5" for name in names if name != "1"]
    curves = {f"eval/score_{name}": [0.1 * at for at in range(15)] for name in names}
    given = {"reward_model_name_or_path": ["m"] * ("1" in names), "reward_function": judges}
    write_run(folder, PPOOptions(**given | options), HEALTHY | curves)


@pytest.mark.end_to_end
def test_runs_are_compared_that_have_the_same_objectives(tmp_path):
    for number, weight in enumerate((0.5, 2)):
        write(tmp_path / f"two_{number}", ["1", "a"], reward_function=[f"f.py:a:{weight}"])
        write(tmp_path / f"three_{number}", ["1", "a", "b"], normalise_scores=["off", "each"][number])
    write(tmp_path / "alone", ["1", "c"])
    write(tmp_path / "other_data", ["1", "a"], prompt_data=["p.jsonl"])
    write(tmp_path / "one", ["1"])
    write_run(tmp_path / "without", PPOOptions(), HEALTHY)
    page = Page(write_report(tmp_path))
    pictures = sorted((tmp_path / "report").glob("*.png"))
    expected = [*(f"objectives_0_{number}.png" for number in range(3)), "objectives_1_0.png"]
    assert [path.name for path in pictures] == expected
    alts = [image["alt"] for image in page.all("img") if "Held-out scores of" in image["alt"]]
    assert len(alts) == 4 and all("of 2 runs" in alt for alt in alts)
    assert any("1 : 0.5 : 0.5 (each)" in alt for alt in alts) and any("1 : 2: " in alt for alt in alts)
    assert page.text.index("Objectives") < page.text.index("Step 3: PPO")


@pytest.mark.end_to_end
def test_pairs_are_limited_and_damaged_runs_are_left_out(tmp_path):
    for number in range(2):
        write(tmp_path / f"run_{number}", ["1", *"abcde"])
        write(tmp_path / f"damaged_{number}", ["1", "a"], reward_function=[7], reward_weights=["x"])
        (tmp_path / f"empty_{number}").mkdir()
        (tmp_path / f"empty_{number}/metrics.jsonl").write_text(
            '{"step": 1, "eval/score_1": null, "eval/score_a": 1}\n'
        )
    text = Page(write_report(tmp_path)).text
    assert (
        f"{len([*itertools.combinations(range(6), 2)]) - 6} more pairs of objectives are not plotted." in text
    )
    assert len(scan(tmp_path).runs) == 6


@pytest.mark.parametrize("count", [12, 13])
def test_the_front_alone_is_labelled_where_runs_are_many(count):
    points = [Point(f"w{n}", {"1": 0.0, "b": 0.0}, {"1": float(n), "b": float(n)}) for n in range(count)]
    figure, _ = draw_pair(points, "1", "b")
    assert len(figure.axes[0].texts) == (12 if count == 12 else 1)
