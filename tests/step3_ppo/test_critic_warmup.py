"""The end of the critic's warmup by explained variance."""

from step3_ppo.critic_warmup import shortened_warmup


def test_the_warmup_ends_once_the_critic_explains_enough():
    assert [shortened_warmup(4, step, share, 0.3) for step, share in ((1, -2.0), (2, 0.29), (3, 0.3))] == [
        None,
        None,
        3,
    ]


def test_the_limit_ends_it_anyway():
    assert shortened_warmup(4, 4, 0.9, 0.3) is None and shortened_warmup(4, 9, 0.9, 0.3) is None
