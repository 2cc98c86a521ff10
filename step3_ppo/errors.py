"""Errors and stops that leave the last finished step intact: a checkpoint of it is saved."""

import contextlib
from collections.abc import Iterator

from common.runtime.options import UserError
from common.training.loop import StepDropped, TrainingLoop


class FunctionError(UserError):
    """A reward function failed on some rank; all ranks raise it together."""

    remedy = "correct its file; then the same command"


class SamplerError(UserError):
    """Sampler and trainer disagree; all ranks raise it together."""

    remedy = "the same command"


@contextlib.contextmanager
def checkpoint_on_error(loop: TrainingLoop) -> Iterator[None]:
    """Save a checkpoint when a reward function fails, sampler and trainer disagree, or a stop drops the step.

    Nothing has changed the weights or the saved state, so the run resumes exactly. Raises UserError or
    Stopped on all ranks, with the step from which the run resumes.
    """
    try:
        yield
    except StepDropped:
        loop.stop_at_last_step()
    except (FunctionError, SamplerError) as error:
        if loop.state.step == 0:
            outcome = "starts again"
        elif loop.save():
            outcome = f"resumes after step {loop.state.step}"
        else:
            outcome = "resumes from an older checkpoint"
        raise UserError(f"{error}; {error.remedy} {outcome}") from error
