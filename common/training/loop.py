"""Training loop of all stages: resume, batches, metrics, due evaluations, checkpoints, stops.

A main creates one `TrainingLoop` and calls it. Models, losses and the order of a step stay in the main:

    loop = TrainingLoop(options, train, held_out, {"tokenizer": tokenizer}, options.global_batch_size)
    engine = ...
    loop.resume({"policy": engine}, "demonstrations")
    for indices in loop.batches():
        metrics = train_step(engine, [train[i] for i in indices], ...)
        loop.finish_step(metrics, SHOWN)
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerFast

from common.data.batching import batch_order, steps_in_epochs
from common.data.examples import Examples
from common.model.engine_protocol import Engine
from common.runtime.distributed import (
    gather_objects,
    init_distributed,
    log,
    ranks_in_words,
    seed_everything,
    use_deterministic_kernels,
)
from common.runtime.option_checks import same_command
from common.runtime.options import RunOptions
from common.runtime.process import Stopped, stop_between_steps, stop_requested
from common.training.checkpoint import checkpoint_folder, save_checkpoint
from common.training.means import StepMetrics
from common.training.metrics import MetricWriter, phase_memory
from common.training.report_to import Trackers
from common.training.resume import resume
from common.training.run_folder import open_run
from common.training.stability import check_numbers
from common.training.train_state import TrainState, check_best_metric


class StepDropped(Stopped):
    """A requested stop of all ranks within a step that has changed nothing yet."""


class TrainingLoop:
    """A training run in its output directory. Every rank creates one and makes the same calls."""

    def __init__(
        self, options: RunOptions, train: Examples, held_out: Sequence[Any],
        tokenizers: dict[str, PreTrainedTokenizerFast], batch_size: int, by_length: bool = True,
        patience: int = 0,
    ) -> None:  # fmt: skip
        """Open the output directory, and find the checkpoint to resume from.

        tokenizers: by their names in messages; a run resumes only with the same ones. batch_size: examples
        per step. by_length: batch examples of similar length. patience: stop early after this many
        evaluations without a better --best_metric; 0: never. Raises UserError when the directory holds
        another run.
        """
        check_best_metric(options, held_out)
        init_distributed(options.timeout_minutes)
        if options.deterministic:
            use_deterministic_kernels()
        epochs = steps_in_epochs(len(train), batch_size, options.num_train_epochs)
        self.total_steps = options.max_steps or epochs
        self.checkpoint = open_run(options, tokenizers, self.total_steps)
        self.folder = Path(options.output_dir)
        self._options, self._train, self._held_out = options, train, len(held_out)
        self._batch_size, self._by_length, self._patience = batch_size, by_length, patience
        seed_everything(options.seed, step=0)

    def resume(self, engines: dict[str, Engine], examples: str, steps: str = "steps") -> None:
        """Load the checkpoint, if there is one, into the engines.

        engines: by their names in checkpoints. examples, steps: nouns for the log.
        """
        self.engines = engines
        self.state: TrainState = resume(self.checkpoint, self._options, engines, self.total_steps)
        trackers = Trackers(self._options, self.state.step)
        self.writer = MetricWriter(
            self._options.output_dir, self.state.step, self.total_steps, self._options.logging_steps, trackers
        )
        log(
            f"{len(self._train)} {examples}, {self._held_out} held out, {self.total_steps} {steps} on"
            f" {ranks_in_words()}"
        )

    @property
    def is_over(self) -> bool:
        """Whether no step is left to train; available before `resume`."""
        step = self.checkpoint.state.step if self.checkpoint else 0
        return self._options.export_only or step >= self.total_steps

    def batches(self) -> Iterator[list[int]]:
        """Yield the example indices of each remaining step, and seed all random generators for it."""
        options, state = self._options, self.state
        lengths = self._train.notes("length")
        order = batch_order(lengths, self._batch_size, options.seed, state.step, self._by_length)
        stop_between_steps()
        while state.step < self.total_steps and not options.export_only and not self.has_stalled:
            seed_everything(options.seed, state.step + 1)
            self._indices = next(order)
            yield self._indices
        if self.has_stalled:
            log(f"stopped early: {self._patience} evaluations without a better {options.best_metric}")

    def finish_step(
        self, metrics: StepMetrics, shown: list[str], skipped: int | None = None, watched: float | None = None
    ) -> None:
        """Count the step and write its metrics.

        metrics: with `time/step`. shown: names for the progress line. skipped: updates skipped because of
        non-finite numbers; default: 1 if `train/grad_norm` is not finite. watched: loss checked for spikes;
        default: `train/loss`. Raises UserError after too many steps in a row with skipped updates.
        """
        if skipped is None:
            skipped = int(not math.isfinite(metrics["train/grad_norm"].value))
        if watched is None:
            watched = metrics["train/loss"].value
        self.state.advance(self._batch_size, len(self._train))
        origins = [self._train.origin(i) for i in self._indices]
        check_numbers(self.state, self._options, skipped, watched, origins)
        self._last_step = {**metrics, "train/skipped_updates": self.state.skipped}, shown
        self.writer.step(self.state, *self._last_step)

    @property
    def first_evaluation_is_due(self) -> bool:
        """Whether to evaluate before the first step of this process."""
        is_first = self.state.step == 0 or self.state.unevaluated
        return self._held_out > 0 and is_first and not self._options.export_only

    @property
    def evaluation_is_due(self) -> bool:
        """Whether to evaluate after the last finished step."""
        step, interval = self.state.step, self._options.eval_steps
        is_due = step == self.total_steps or (interval > 0 and step % interval == 0)
        return self._held_out > 0 and is_due

    def log_evaluation(self, metrics: dict[str, float], shown: list[str]) -> bool:
        """Write the metrics of an evaluation; true if --best_metric is the best so far."""
        self.state.unevaluated = False
        self.writer.log(self.state.step, {**metrics, **phase_memory("eval")}, shown)
        torch.cuda.empty_cache()
        return self.state.is_best(self._options.best_metric, metrics)

    @property
    def has_stalled(self) -> bool:
        """Whether --best_metric has not improved for `patience` evaluations."""
        return 0 < self._patience <= self.state.evaluations_since_best

    def save(self) -> bool:
        """Save a checkpoint; false, with a line in the log, when it cannot be written."""
        return save_checkpoint(self._options, self.state, self.engines)

    def save_if_due(self, is_best: bool) -> None:
        """Save a checkpoint after a step if it is due, the best so far, or the last before a requested stop.

        Raises Stopped on all ranks after a requested stop.
        """
        if self.has_stalled:
            self.writer.flush(self.state, *self._last_step)
        options, step = self._options, self.state.step
        is_last = step == self.total_steps or self.has_stalled
        is_stopped = stop_requested(options.output_dir) and not is_last
        is_due = options.save_steps and (is_last or step % options.save_steps == 0)
        is_saved = (is_stopped or is_best or is_due) and self.save()
        if is_stopped:
            self._stop(is_saved)

    def drop_step_if_stopped(self) -> None:
        """Raise StepDropped on all ranks after a requested stop, before the first update of a step."""
        if stop_requested(self._options.output_dir):
            raise StepDropped("the step is dropped")

    def stop_at_last_step(self) -> NoReturn:
        """Stop after StepDropped; the checkpoint is that of the last finished step."""
        if self.state.step == 0:
            raise Stopped(f"Stopped before the end of step 1. {same_command(self._options)} to start again.")
        folder = checkpoint_folder(self._options, self.state)
        self._stop(any(gather_objects(folder.exists())) or self.save())

    def _stop(self, is_saved: bool) -> NoReturn:
        folder = checkpoint_folder(self._options, self.state)
        saved = f"checkpoint {folder}" if is_saved else "its checkpoint was NOT saved"
        again = same_command(self._options)
        raise Stopped(f"Stopped at step {self.state.step}; {saved}. {again} to resume.")

    def stop_after_training(self) -> NoReturn:
        """Stop between the last step and the exports; the same command resumes from the checkpoint."""
        folder = checkpoint_folder(self._options, self.state)
        if any(gather_objects(folder.exists())) or self.save():
            saved, purpose = f"checkpoint {folder}", "finish"
        else:
            saved, purpose = "its checkpoint was NOT saved", "resume from an older one, or to start again"
        raise Stopped(f"Stopped after the last step; {saved}. {same_command(self._options)} to {purpose}.")
