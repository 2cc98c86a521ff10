"""An evaluation on held-out prompts within a run: metrics, samples, the best model."""

from collections.abc import Sequence
from functools import partial

from common.model.engine import states_away
from common.model.engine_protocol import Engine
from common.runtime.distributed import seed_everything
from common.text.prompts import Prompt
from common.training.export import export_best
from common.training.loop import TrainingLoop
from step3_ppo.errors import checkpoint_on_error
from step3_ppo.metrics import as_markdown, evaluate
from step3_ppo.models import Models, ModelSources, load_actor
from step3_ppo.options import PPOOptions
from step3_ppo.state import PPOState


def log_evaluation(
    loop: TrainingLoop, models: Models, held_out: Sequence[Prompt], options: PPOOptions,
    sources: ModelSources, trained: Sequence[Engine], state: PPOState, shown: list[str],
) -> bool:  # fmt: skip
    """Evaluate the policy and write metrics and samples; true if it is the best so far, written to best/.

    trained: engines whose states leave the device meanwhile. shown: names for the progress line.
    """
    seed_everything(options.seed, loop.state.step)
    loop.state.unevaluated = True  # until the functions have succeeded
    with checkpoint_on_error(loop), states_away(trained):
        metrics, samples = evaluate(models, held_out, options, state)
    is_best = loop.log_evaluation(metrics, shown)
    loop.writer.samples(loop.state.step, samples)
    loop.writer.text(loop.state.step, "samples", as_markdown(samples))
    if is_best:
        load_base = partial(load_actor, options, sources)
        export_best(models.actor, models.encoder.tokenizer, loop.folder / "best", load_base)
    return is_best
