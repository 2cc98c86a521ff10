"""Direct preference optimisation, in place of steps 2 and 3.

Trains a policy on preferences, without a reward model and without sampling.

    bash launch/step2_direct.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
"""

import time
from collections.abc import Sequence
from functools import partial

from common.data.batching import examples_of_steps
from common.data.loading import load_examples
from common.model.engine import make_engine
from common.model.engine_protocol import Engine
from common.model.loading import fit_to_model, load_causal_lm
from common.model.lora import add_adapters, check_adapters
from common.model.roles import policy_config
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.option_parser import parse_options
from common.runtime.process import run_main
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.export import export_best, export_model
from common.training.loop import TrainingLoop
from common.training.means import Mean
from common.training.metrics import peak_memory_gib, phase_memory
from common.training.run_folder import check_folder
from step2_reward.direct.data import Choice, tokenize_paired, tokenize_unpaired
from step2_reward.direct.objective import batch_metrics, check_accuracy, evaluate
from step2_reward.direct.options import DirectOptions
from step2_reward.direct.reference import Example, check_reference, load_reference, with_reference
from step2_reward.direct.reward_shift import RewardShift


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(DirectOptions)
    zero = load_zero_config(options.zero_config, options, options.learning_rate)
    for name in ("model_name_or_path", "reference_model_name_or_path"):
        if path := getattr(options, name):
            options = fit_to_model(options, policy_config(path, name))
    check_adapters(options.model_name_or_path, options, zero)
    check_folder(options)
    tokenizer = load_tokenizer(options.model_name_or_path)
    check_reference(options, tokenizer)
    convert = partial(
        tokenize_paired if options.is_paired else tokenize_unpaired, encoder=SegmentEncoder(tokenizer),
        max_length=options.max_length, overlong=options.overlong,
    )  # fmt: skip
    data = load_examples(options.train_data, options, Choice, convert)
    check_accuracy(options, data[1])
    loop = TrainingLoop(options, *data, {"tokenizer": tokenizer}, options.global_batch_size)

    # 2. Load the model, compute the reference log-probabilities and resume. By default the reference is the
    #    model before training; another one is freed before the model is loaded. Exports need no reference.
    lengths = data[0].notes("length")
    used = examples_of_steps(lengths, options.global_batch_size, options.seed, loop.total_steps)
    needed = used, range(len(data[1]))
    add_reference = partial(with_reference, data, needed, options, zero)
    examples = data if loop.is_over else None
    if options.reference_model_name_or_path and not loop.is_over:
        examples = add_reference(partial(load_reference, options, tokenizer, zero))
    model = add_adapters(load_causal_lm(options.model_name_or_path, tokenizer, zero), options, options.seed)
    engine = make_engine(model, zero, options, options.learning_rate, loop.total_steps)
    train, held_out = examples or add_reference(lambda: engine)
    loop.resume({"policy": engine}, "records")
    shift = RewardShift.load(loop.state.controllers)
    load_base = partial(load_causal_lm, options.model_name_or_path, tokenizer, unpartitioned(zero))

    def evaluate_and_log() -> bool:
        metrics = evaluate(engine, held_out, options, shift.mean)
        is_best = loop.log_evaluation(
            metrics, ["eval/loss", "eval/accuracy", "eval/margin", "eval/nll_chosen"]
        )
        if is_best:
            export_best(engine, tokenizer, loop.folder / "best", load_base)
        return is_best

    # 3. Train.
    if loop.first_evaluation_is_due:
        evaluate_and_log()
    for indices in loop.batches():
        metrics = train_step(engine, [train[i] for i in indices], options, shift)
        loop.state.controllers = shift.plain()
        loop.finish_step(metrics, ["train/loss", "train/accuracy", "reward/margin", "train/lr"])
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 4. Export the model.
    export_model(engine, tokenizer, loop.folder / "final", load_base)


def train_step(
    engine: Engine, batch: Sequence[Example], options: DirectOptions, shift: RewardShift
) -> dict[str, Mean | float]:
    """Take one optimiser step; each rank processes its micro-batches of the global batch."""
    start, rate = time.perf_counter(), engine.get_lr()[0]
    metrics, norm = batch_metrics(engine, batch, options, train=True, shift=shift.mean)
    if options.bco_shift:
        metrics["reward/shift"] = Mean(options.beta * shift.mean)
        shift.add(*(metrics[f"reward/{side}"].value / options.beta for side in ("chosen", "rejected")))
    seconds = time.perf_counter() - start
    return {
        **{name if "/" in name else f"train/{name}": value for name, value in metrics.items()},
        "train/lr": rate,
        "train/grad_norm": Mean(norm),
        "train/tokens_per_second": Mean(sum(example.row.length for example in batch), seconds),
        "time/step": Mean(seconds),
        "memory/peak_gib": peak_memory_gib(),
        **phase_memory(),
    }


if __name__ == "__main__":
    run_main(main)
