"""Comparison statistics, checked by enumeration, closed forms, and a fit with torch."""

from itertools import combinations
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
import torch

from step3_ppo.compare.report import plot_scores, table
from step3_ppo.compare.statistics import best_of, best_of_kl, mean, win_rate_at_equal_length, wins

DRAW = np.random.default_rng(0)
Z = NormalDist().inv_cdf(0.975)


def test_mean_and_interval():
    values = DRAW.normal(3, 2, 50)
    result, half = mean(values), Z * stdev(values) / 50**0.5
    assert list(result.values()) == pytest.approx([fmean(values), fmean(values) - half, fmean(values) + half])


def test_win_rate_leaves_out_ties():
    result = wins(np.array([1, 2, 3, 0, 5.0]), np.array([0, 2, 4, -1, 5.0]), np.zeros(5))
    assert (result["wins"], result["ties"], result["losses"]) == (2, 2, 1)
    assert result["win_rate"]["mean"] == 2 / 3 and result["at_equal_length"] == result["win_rate"]
    none = wins(np.zeros(3), np.zeros(3), np.arange(3))
    assert none == {"wins": 0, "ties": 3, "losses": 0, "win_rate": None, "at_equal_length": None}


@pytest.mark.parametrize(("won", "lost"), [(7, 3), (1, 0), (0, 5), (40, 0), (913, 87)])
def test_interval_of_the_win_rate_inverts_the_score_test(won, lost):
    scores = np.array([1.0] * won + [-1.0] * lost)
    rate = wins(scores, 0 * scores, 0 * scores)["win_rate"]
    assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
    for p in (rate["low"], rate["high"]):
        distance = abs(rate["mean"] - p)
        assert distance == pytest.approx(Z * (p * (1 - p) / (won + lost)) ** 0.5, rel=1e-6, abs=1e-9)
    assert rate["high"] - rate["low"] > 0.01


def fitted_by_torch(won: np.ndarray, longer: np.ndarray) -> tuple[float, float]:
    """The intercept that maximises Firth's penalised likelihood, and its standard error."""
    feature = torch.tensor(np.tanh(longer / longer.std()))
    x, y = torch.stack([torch.ones_like(feature), feature], 1), torch.tensor(won).double()
    numbers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([numbers], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def information() -> torch.Tensor:
        p = torch.sigmoid(x @ numbers)
        return (x.T * (p * (1 - p))) @ x

    def closure() -> torch.Tensor:
        search.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ numbers, y, reduction="sum")
        loss = loss - 0.5 * torch.logdet(information())
        loss.backward()
        return loss

    search.step(closure)
    return numbers[0].item(), torch.linalg.inv(information())[0, 0].sqrt().item()


@pytest.mark.parametrize("count", [12, 300])
@pytest.mark.parametrize("kind", ["mixed", "the longer always wins", "one always wins"])
def test_win_rate_at_equal_length_maximises_the_penalised_likelihood(kind, count):
    draw = np.random.default_rng(count)
    longer = draw.integers(-30, 50, count)
    by_chance = draw.random(count) < 0.4
    won = {"mixed": by_chance, "the longer always wins": longer > 0, "one always wins": longer < 50}[kind]
    rate, (logit, error) = win_rate_at_equal_length(won, longer), fitted_by_torch(won, longer)
    expected = [1 / (1 + np.exp(-logit - shift)) for shift in (0, -Z * error, Z * error)]
    assert [rate["mean"], rate["low"], rate["high"]] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    other = win_rate_at_equal_length(~won, -longer)
    assert other["mean"] == pytest.approx(1 - rate["mean"]), "both sides add up to 1"


def test_win_rate_at_equal_length_removes_the_effect_of_length():
    """Policies differ only in length, and the judge prefers length: 71 % wins, 50 % at equal length."""
    longer = DRAW.normal(20, 20, 200_000)
    won = DRAW.random(200_000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    assert won.mean() > 0.7
    rate = win_rate_at_equal_length(won, longer)
    assert rate["low"] < 0.5 < rate["high"] and rate["high"] - rate["low"] < 0.02


@pytest.mark.parametrize(
    "longer",
    [np.array([]), np.full(4, 7), np.array([27, 28] * 20), -98 + DRAW.integers(-2, 3, 200)],
    ids=["none", "by as much", "27 or 28", "-98"],
)
def test_no_win_rate_at_equal_length_when_one_side_is_always_much_longer(longer):
    assert win_rate_at_equal_length(DRAW.random(len(longer)) < 0.5, longer) is None


def test_fit_converges_where_plain_newton_diverges():
    """Length differences from a Cauchy distribution: the fit is still the maximum."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        longer = np.round(20 * draw.standard_cauchy(300))
        won = longer > draw.normal(0, 5, 300)
        rate, (logit, _) = win_rate_at_equal_length(won, longer), fitted_by_torch(won, longer)
        assert rate["mean"] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """Enumerates the subsets of seven responses with ties; equal ones are selected with equal probability."""
    proxy, gold = DRAW.integers(0, 4, (5, 7)).astype(float), DRAW.normal(0, 1, (5, 7))
    expected = []
    for picks, scores in zip(proxy, gold, strict=True):
        subsets = [list(subset) for subset in combinations(range(7), n)]
        winners = [[i for i in subset if picks[i] == max(picks[subset])] for subset in subsets]
        expected.append(fmean(fmean(scores[i] for i in equals) for equals in winners))
    np.testing.assert_allclose(best_of(proxy, gold, n), expected, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_kl_of_best_of_n_is_that_of_the_maximum_of_n_uniform_numbers(n):
    """The maximum has density n u^(n - 1); the KL is the integral of the density times its logarithm."""
    midpoints = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = n * midpoints ** (n - 1)
    assert best_of_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-6)


def share(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.2}


def figures(policies: int, curve: int) -> dict:
    """A report with two judges."""
    plain = {"length": 9.0, "eos_rate": 0.5, "distinct_1": 0.9, "distinct_2": 1.0, "repeated_3": 0.0}
    against = {"wins": 1, "ties": 2, "losses": 3, "win_rate": share(0.25), "at_equal_length": None}
    rows = []
    for number in range(policies):
        scores = {"reward model": share(number), "gold score": share(1)}
        one = {"model": f"some/folder/{number}/final", "scores": scores, "kl": share(number - 1e-9)}
        both = [dict.fromkeys(scores, against | {"wins": 10 * number + k}) for k in range(number)]
        rows.append(one | plain | {"perplexity": 3.0, "against": both})
    best = [
        {"n": 2**k, "kl": float(k), "scores": {"reward model": share(k), "gold score": share(-k)}}
        for k in range(curve)
    ]
    return {"prompts": 6, "policies": rows, "best_of": best}


def test_table():
    models, compared, reward, gold, *pairs, best = table(figures(4, 2)).split("\n\n")
    assert models.splitlines()[1:] == [f"{n + 1}  some/folder/{n}/final" for n in range(4)]
    rows = compared.splitlines()
    assert rows[0].split() == ["1", "2", "3", "4"] and len({len(row) for row in rows}) == 1
    assert "1.000 (0.900 to 1.200)" in rows[1] and "perplexity" in rows[-1]
    assert reward.split("\n")[0].split()[-9:] == ["10,", "2,", "3", "20,", "2,", "3", "30,", "2,", "3"]
    assert gold.count("not separable from length") == 3
    assert "25.0% (15.0% to 45.0%)" in reward and best.splitlines()[2].startswith("2 ")
    for name, lines in zip(("reward model", "gold score"), pairs, strict=True):
        head, *others = lines.splitlines()
        assert head.startswith(f"{name}: other pairs   ")
        expected = {"3 against 2": "21, 2, 3", "4 against 2": "31, 2, 3", "4 against 3": "32, 2, 3"}
        for line, (pair, counts) in zip(others, expected.items(), strict=True):
            assert line.startswith(pair) and counts in line and "25.0%" in line
    assert "other pairs" not in table(figures(2, 2))
    alone = table(figures(1, 1))
    assert "wins" not in alone and "best of" not in alone


def test_plot_shows_the_scores(tmp_path):
    drawn = plot_scores(figures(2, 3))
    for axes, sign in zip(drawn.axes, (1, -1), strict=True):
        first, second, curve = (container.lines[0].get_xydata() for container in axes.containers)
        assert first[0, 0] == 0.0 and second[0, 0] == pytest.approx(1.0)
        np.testing.assert_allclose(curve, [[k**0.5, sign * k] for k in range(3)])
        (whiskers,) = axes.containers[2].lines[2]
        np.testing.assert_allclose(whiskers.get_segments()[1][:, 1], [sign - 0.1, sign + 0.2])
    plot_scores(figures(1, 1)).savefig(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5000
