"""The end of the critic's warmup. Pure."""


def shortened_warmup(steps: int, step: int, explained_variance: float, target: float) -> int | None:
    """Iterations of a warmup that ends after this one, as the critic explains enough; None: not yet.

    steps: planned iterations, after which it ends anyway. step: iterations made. explained_variance: of the
    returns, before the update of the iteration. Source: Yuan et al. 2025 (VC-PPO), value
    pretraining: on responses of the fixed policy, until loss and explained variance are good enough.
    """
    return step if step < steps and explained_variance >= target else None
