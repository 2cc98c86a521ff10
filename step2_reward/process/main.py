"""Step 2, process: a reward model that scores each step of a response.

Trains the SFT model with a scalar head to tell right steps from wrong ones. The score at a step's end is the
log-odds that the step is right.

    bash launch/step2_process.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.data.batching import deal, micro_batch
from common.data.loading import load_examples
from common.model.engine import backward_and_step, make_engine
from common.model.engine_protocol import Engine
from common.model.forward import pad_token_id
from common.model.loading import fit_to_model, load_scalar_model
from common.model.lora import add_adapters, check_adapters
from common.model.roles import backbone_config
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.distributed import rank, sum_over_ranks
from common.runtime.option_parser import parse_options
from common.runtime.options import world_size
from common.runtime.process import run_main
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.expert_use import ExpertUse
from common.training.export import export_best, export_model
from common.training.loop import TrainingLoop
from common.training.means import Mean
from common.training.metrics import peak_memory_gib, phase_memory
from common.training.run_folder import check_folder
from step2_reward.centring import set_centre
from step2_reward.process.data import LabelledSteps, collate, tokenize_steps
from step2_reward.process.objective import evaluate, figures, step_losses
from step2_reward.process.options import ProcessRewardOptions


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(ProcessRewardOptions)
    zero = load_zero_config(options.zero_config, options, options.learning_rate)
    config = backbone_config(options.model_name_or_path, "model_name_or_path", scores_steps=True)
    options = fit_to_model(options, config)
    check_adapters(options.model_name_or_path, options, zero)
    check_folder(options)
    tokenizer = load_tokenizer(options.model_name_or_path)
    convert = partial(
        tokenize_steps, encoder=SegmentEncoder(tokenizer), max_length=options.max_length,
        overlong=options.overlong, separator=options.separator,
    )  # fmt: skip
    train, held_out = load_examples(options.train_data, options, LabelledSteps, convert)
    loop = TrainingLoop(options, train, held_out, {"tokenizer": tokenizer}, options.global_batch_size)

    # 2. Load the model and resume.
    model = add_adapters(load_model(options, tokenizer, zero), options, options.seed)
    engine = make_engine(model, zero, options, options.learning_rate, loop.total_steps)
    loop.resume({"process": engine}, "records")
    load_base = partial(load_model, options, tokenizer, unpartitioned(zero))

    def evaluate_and_log() -> bool:
        metrics = evaluate(engine, held_out, micro_batch(options))
        is_best = loop.log_evaluation(metrics, ["eval/loss", "eval/accuracy", "eval/first_error"])
        if is_best:
            export_best(engine, tokenizer, loop.folder / "best", load_base)
        return is_best

    # 3. Train.
    if loop.first_evaluation_is_due:
        evaluate_and_log()
    for indices in loop.batches():
        metrics = train_step(engine, [train[i] for i in indices], options)
        loop.finish_step(metrics, ["train/loss", "train/accuracy", "train/first_error", "train/lr"])
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 4. Export the model.
    export_model(engine, tokenizer, loop.folder / "final", load_base)


def load_model(
    options: ProcessRewardOptions, tokenizer: PreTrainedTokenizerFast, zero: dict[str, Any] | None
) -> PreTrainedModel:
    """The initial model, marked as a process model by `step_separator` in its configuration. Its scores are
    log-odds, so they are not centred.
    """
    model = load_scalar_model(options.model_name_or_path, tokenizer, zero, options.seed)
    set_centre(model, 0.0, 1.0)
    model.config.step_separator = options.separator
    return model


def train_step(
    engine: Engine, records: Sequence[LabelledSteps], options: ProcessRewardOptions
) -> dict[str, Mean | float]:
    """Take one optimiser step; each rank processes its micro-batches of the global batch."""
    start, rate = time.perf_counter(), engine.get_lr()[0]
    lengths = [record.length for record in records]
    batches = deal(range(len(records)), lengths, micro_batch(options), rank(), world_size())
    num_steps = sum(len(record.labels) for record in records)
    sums = torch.zeros(6, dtype=torch.float64)
    micros = [collate([records[i] for i in indices], pad_token_id(engine)) for indices in batches]
    experts = ExpertUse(engine, partial(step_losses, engine), micros)
    for number, micro in enumerate(micros, start=1):
        losses, batch_sums = step_losses(engine, micro)
        loss = losses.sum() / num_steps + experts.loss()
        norm = backward_and_step(engine, loss, world_size(), is_last=number == len(batches))
        sums += batch_sums
    metrics = figures(*sum_over_ranks(*sums))
    seconds = time.perf_counter() - start
    return {
        **{f"train/{name}": mean for name, mean in metrics.items()},
        **experts.metrics(),
        "train/lr": rate,
        "train/grad_norm": Mean(norm),
        "train/tokens_per_second": Mean(sum(lengths), seconds),
        "time/step": Mean(seconds),
        "memory/peak_gib": peak_memory_gib(),
        **phase_memory(),
    }


if __name__ == "__main__":
    run_main(main)
