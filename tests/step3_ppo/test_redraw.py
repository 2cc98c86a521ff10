"""Groups with equal scores are replaced by groups of other prompts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from step3_ppo import redraw as module
from step3_ppo.options import PPOOptions
from step3_ppo.redraw import has_spread, other_prompts, redraw_equal_groups
from step3_ppo.rollout import Rollout, concatenate
from tests.end_to_end.test_resume import assert_same_end
from tests.ranks import succeed
from tests.stages import metrics, ppo
from tests.step3_ppo.rollouts import rollout_of

# By prompt: the scores of its two responses. Prompts 0, 2 and 3 teach nothing.
SCORES = {0: (1.0, 1.0), 1: (0.0, 1.0), 2: (0.5, 0.5), 3: (0.0, 0.0), 4: (2.0, 1.0), 5: (0.0, 3.0)}


def test_groups_with_different_scores():
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 1e-7])
    assert has_spread(scores, 2).tolist() == [False, True, True]
    assert has_spread(scores, 3).tolist() == [False, True]


def test_other_prompts_are_new_and_depend_on_seed_and_step():
    drawn = other_prompts(4, [3, 1], 8, seed=0, step=5)
    assert len({*drawn}) == 4 and not {*drawn} & {1, 3} and {*drawn} < {*range(8)}
    assert drawn == other_prompts(4, [1, 3], 8, seed=0, step=5)
    assert any(drawn != other_prompts(4, [3, 1], 8, 0, step) for step in range(6, 10))
    assert any(drawn != other_prompts(4, [3, 1], 8, seed, 5) for seed in range(1, 5))
    assert sorted(other_prompts(9, [3, 1], 8, 0, 5)) == [0, 2, 4, 5, 6, 7]


def rollout(prompts: list[int]) -> Rollout:
    """Two responses of `prompt` + 1 tokens to each prompt; every number is made of the prompt's."""
    numbers = torch.tensor(prompts).repeat_interleave(2)
    width = int(numbers.max()) + 1
    made = rollout_of(
        numbers[:, None] * (torch.arange(width + 1) <= numbers[:, None] + 1),
        torch.ones_like(numbers), numbers + 1, numbers > 2,
        logprobs=-numbers[:, None].float() * (torch.arange(width) <= numbers[:, None]),
        support_ids=[torch.full((n + 1,), n, dtype=torch.int32) for n in numbers.tolist()],
    )  # fmt: skip
    return replace(made, scores=torch.tensor([SCORES[prompt] for prompt in prompts]).flatten())


@pytest.fixture
def redrawn(monkeypatch: pytest.MonkeyPatch):
    """Redraw a rollout, with other prompts in a given order; returns it and its metrics."""

    def run(
        prompts: list[int], attempts: list[list[int]], max_redraws: int, **more: Any
    ) -> tuple[Rollout, dict]:
        queue = iter(attempts)
        monkeypatch.setattr(module, "other_prompts", lambda count, *_, **__: next(queue)[:count])
        monkeypatch.setattr(module, "sample_rollout", lambda _, __, rows, ___, ____: rollout(rows[::2]))
        monkeypatch.setattr(module, "score_rollout", lambda _, __, new, ___: new)
        options = PPOOptions(samples_per_prompt=2, max_redraws=max_redraws, advantage_estimator="group")
        models = SimpleNamespace(sampler=None, encoder=None, scorer=None)
        first = rollout(prompts)
        result, figures = redraw_equal_groups(models, range(6), prompts, first, options, 1, **more)
        return result, {name.removeprefix("rollout/"): mean.value for name, mean in figures.items()}

    return run


def prompts_of(result: Rollout) -> list[int]:
    return result.input_ids[::2, 0].tolist()


def test_equal_groups_are_replaced_in_their_places(redrawn):
    result, figures = redrawn([0, 1, 2], [[3, 5], [4]], max_redraws=3)
    assert prompts_of(result) == [5, 1, 4]
    assert figures == {"equal_groups": pytest.approx(2 / 3), "equal_groups_left": 0, "redrawn_groups": 3}
    expected = rollout([5, 1, 4])
    for name, value in vars(expected).items():
        got = getattr(result, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[:, : value.shape[1]] if value.dim() > 1 else got, value), name
    assert [ids.tolist() for ids in result.support_ids] == [ids.tolist() for ids in expected.support_ids]


def test_attempts_are_limited_and_end_without_prompts(redrawn):
    assert prompts_of(redrawn([0, 2], [[3, 1], [5]], max_redraws=1)[0]) == [1, 2]
    result, figures = redrawn([0, 2], [[3, 1], []], max_redraws=9)
    assert prompts_of(result) == [1, 2] and figures["equal_groups_left"] == 0.5
    result, figures = redrawn([0, 1], [], max_redraws=0)
    assert prompts_of(result) == [0, 1] and figures["redrawn_groups"] == 0


def test_a_stop_ends_the_attempts(redrawn):
    calls = []

    def stop_at_second() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        redrawn([0, 2], [[3, 1], [5], [4]], max_redraws=9, before_attempt=stop_at_second)
    redrawn([1, 4], [], max_redraws=9, before_attempt=stop_at_second)  # no attempt
    assert len(calls) == 2


def test_shorter_and_longer_rollouts_are_joined():
    both = concatenate(rollout([1]), rollout([4]))
    assert both.logprobs.shape == (4, 5) and both.logprobs[:2, 2:].eq(0).all()
    assert both.pick([3, 0]).response_lengths.tolist() == [5, 2]


FUNCTION = """
def some(prompts, responses, records):
    return [len(text) % 3 * (len(str(prompt)) % 2) for prompt, text in zip(prompts, responses)]
"""


def test_runs_with_redraws_do_not_depend_on_ranks_and_resume_exactly(world, run, tmp_path):
    (tmp_path / "some.py").write_text(FUNCTION)

    def options(output: Path, *more: str) -> list[str]:
        words = ppo(world, run / "sft/final", Path("-"), output, 3)
        at = words.index("--reward_model_name_or_path")
        words[at : at + 2] = ["--reward_function", f"{tmp_path / 'some.py'}:some"]
        words += ["--advantage_estimator", "group", "--samples_per_prompt", "2", "--max_redraws", "8"]
        words += ["--seed", "1"]  # no draw of its updated policies is within rounding of another token
        return [*words, "--lr_scheduler_type", "constant", "--eval_fraction", "0", *more]

    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    succeed("step3_ppo.main", options(one), tmp_path)
    equal, left = metrics(one, "rollout/equal_groups"), metrics(one, "rollout/equal_groups_left")
    assert min(equal) > 0.2 and left == [0, 0, 0] and min(metrics(one, "rollout/redrawn_groups")) >= 2
    succeed("step3_ppo.main", options(two), tmp_path, 2)
    assert metrics(two, "reward/mean") == pytest.approx(metrics(one, "reward/mean"), rel=1e-3)
    for steps in ("1", "3"):
        succeed("step3_ppo.main", options(parts, "--max_steps", steps, "--save_steps", "1"), tmp_path)
    assert_same_end(one, parts)
