"""Confidence intervals of shares. Pure."""

from typing import Any

Z95 = 1.959964  # two-sided 95 % quantile of the standard normal distribution


def wilson(share: float, trials: int) -> tuple[float, float]:
    """Wilson score interval (95 %) of a share in [0, 1] of independent trials. Source: Wilson 1927."""
    weight = Z95**2 / trials
    middle = (share + weight / 2) / (1 + weight)
    half = (share * (1 - share) * weight + weight**2 / 4) ** 0.5 / (1 + weight)
    # Rounding may put a share of 0 or 1 outside its interval.
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)


def share(hits: float, trials: int) -> dict[str, Any] | None:
    """Share with its interval, for reports; None without trials."""
    return (
        {"share": hits / trials, "interval": wilson(hits / trials, trials), "of": trials} if trials else None
    )


def format_share(result: dict[str, Any] | None) -> str:
    """Format a result of `share` as text."""
    if result is None:
        return "no records to measure it on"
    low, high = result["interval"]
    return f"{result['share']:.1%} of {result['of']} ({low:.1%} to {high:.1%})"
