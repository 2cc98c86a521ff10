"""How sure a measured share is. Pure."""

from typing import Any

Z95 = 1.959964  # 95 % of a standard normal distribution lie within this


def wilson(share: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share, 0 to 1, of so many independent trials: all p from which it is at most
    1.96 standard deviations away. Source: Wilson 1927.
    """
    weight = Z95**2 / trials
    middle = (share + weight / 2) / (1 + weight)
    half = (share * (1 - share) * weight + weight**2 / 4) ** 0.5 / (1 + weight)
    # Rounding may put a share of 0 or 1 outside.
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)


def share(hits: float, trials: int) -> dict[str, Any] | None:
    """A share with its interval, for a report; None without trials."""
    return (
        {"share": hits / trials, "interval": wilson(hits / trials, trials), "of": trials} if trials else None
    )


def share_in_words(found: dict[str, Any] | None) -> str:
    """What `share` has found."""
    if found is None:
        return "nothing to measure it on"
    low, high = found["interval"]
    return f"{found['share']:.1%} of {found['of']} ({low:.1%} to {high:.1%})"
