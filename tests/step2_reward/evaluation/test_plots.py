"""Plots show the numbers they are drawn from, and can be saved."""

import numpy as np
import pytest

from step2_reward.evaluation.figures import reward_metrics
from step2_reward.evaluation.plots import plots
from tests.step2_reward.evaluation.test_figures import pairs


def test_plots_show_the_metrics():
    judged = pairs(*np.random.default_rng(0).normal(0, 1, (2, 300)), is_tie=np.arange(300) < 20)
    metrics = reward_metrics(judged)
    drawn = plots(judged, metrics)
    upper, lower = drawn["reliability"].axes
    measured = upper.containers[0].lines[0].get_xydata()
    bins = metrics["prediction"]["bins"]
    assert measured.tolist() == [[one["confidence"], one["accuracy"]] for one in bins]
    (whiskers,) = upper.containers[0].lines[2]
    ends = [[low, high] for (_, low), (_, high) in whiskers.get_segments()]
    np.testing.assert_allclose(ends, [[one["low"], one["high"]] for one in bins])
    assert [bar.get_height() for bar in lower.patches] == [one["pairs"] for one in bins]
    rejected = drawn["scores"].axes[0].containers[0]
    assert sum(bar.get_height() for bar in rejected) == 280, "ties are excluded"


@pytest.mark.parametrize("chosen", [[0.0], [1.0], [-1.0], [5.0] * 7, [-5.0] * 7])
def test_small_and_extreme_data_can_be_plotted(tmp_path, chosen):
    from torch.utils.tensorboard import SummaryWriter

    judged = pairs(chosen, [0.0] * len(chosen))
    with SummaryWriter(tmp_path) as board:
        for name, figure in plots(judged, reward_metrics(judged)).items():
            figure.savefig(tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 5000
            board.add_figure(f"eval/{name}", figure)
