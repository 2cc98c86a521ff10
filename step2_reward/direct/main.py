"""Step 2, direct preference optimisation: steps 2 and 3 in one.

Teaches a policy to prefer the better responses of preference data, with no reward model and no sampling.

    bash launch/step2_direct.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.data.batching import batch_order, examples_of_steps, steps_in_epochs
from common.data.loading import load_examples
from common.model.engine import make_engine
from common.model.loading import load_causal_lm, longest_input
from common.model.lora import add_adapters, check_adapters
from common.model.roles import policy_config
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.distributed import init_distributed, log, ranks_in_words, seed_everything
from common.runtime.options import parse_options
from common.runtime.process import run_main, stop_between_steps
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.checkpoint import save_if_due
from common.training.export import export_best, export_model
from common.training.means import Mean
from common.training.metrics import MetricWriter, peak_memory_gib
from common.training.resume import resume
from common.training.run_folder import check_folder, open_run
from common.training.stability import check_step
from common.training.train_state import check_best_metric
from step2_reward.direct.data import Choice, paired, unpaired
from step2_reward.direct.objective import check_accuracy, evaluate, measure
from step2_reward.direct.options import DirectOptions, complete
from step2_reward.direct.reference import Example, check_reference, load_reference, with_reference


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(DirectOptions, required=["model_name_or_path", "train_data"])
    complete(options)
    zero = load_zero_config(options.zero_config, options, options.learning_rate)
    for name in ("model_name_or_path", "reference_model_name_or_path"):
        if path := getattr(options, name):
            options.max_length = longest_input(policy_config(path, name), options.max_length, "max_length")
    check_adapters(options.model_name_or_path, options)
    check_folder(options)
    tokenizer = load_tokenizer(options.model_name_or_path)
    check_reference(options, tokenizer)
    convert = partial(
        paired if options.is_paired else unpaired, encoder=SegmentEncoder(tokenizer),
        max_length=options.max_length, overlong=options.overlong,
    )  # fmt: skip
    data = load_examples(options.train_data, options, Choice, convert)
    check_best_metric(options, data[1])
    check_accuracy(options, data[1])
    init_distributed(options.timeout_minutes)
    lengths, origin = data[0].notes("length"), data[0].origin
    total_steps = options.max_steps or steps_in_epochs(
        len(lengths), options.global_batch_size, options.num_train_epochs
    )
    checkpoint = open_run(options, {"tokenizer": tokenizer}, total_steps)

    # 2. The model, what the reference says, and where the run stands. The reference is the model as it is
    #    before training, or another one, which has left by the time that the model comes. Exports need none.
    seed_everything(options.seed, step=0)
    used = examples_of_steps(lengths, options.global_batch_size, options.seed, total_steps)
    needed = used, range(len(data[1]))
    read = partial(with_reference, data, needed, options, zero, tokenizer.pad_token_id)
    is_over = options.export_only or (checkpoint is not None and checkpoint.state.step >= total_steps)
    judged = data if is_over else None
    if options.reference_model_name_or_path and not is_over:
        judged = read(partial(load_reference, options, tokenizer, zero))
    model = add_adapters(load_causal_lm(options.model_name_or_path, tokenizer, zero), options, options.seed)
    engine = make_engine(model, zero, options, options.learning_rate, total_steps)
    train, held_out = judged or read(lambda: engine)
    engines = {"policy": engine}
    state = resume(checkpoint, options, engines, total_steps)
    metrics = MetricWriter(options.output_dir, state.step, total_steps, options.logging_steps)
    output = Path(options.output_dir)
    load_base = partial(load_causal_lm, options.model_name_or_path, tokenizer, unpartitioned(zero))
    log(f"{len(train)} records, {len(held_out)} held out, {total_steps} steps on {ranks_in_words()}")

    def evaluate_and_log() -> bool:
        found = evaluate(engine, held_out, options, tokenizer.pad_token_id)
        metrics.log(state.step, found, ["eval/loss", "eval/accuracy", "eval/margin", "eval/nll_chosen"])
        if is_best := state.is_best(options.best_metric, found):
            export_best(engine, tokenizer, output / "best", load_base)
        return is_best

    # 3. Train.
    if held_out and state.step == 0:
        evaluate_and_log()
    order = batch_order(lengths, options.global_batch_size, options.seed, state.step, grouped=True)
    stop_between_steps()
    while state.step < total_steps and not options.export_only:
        seed_everything(options.seed, state.step + 1)
        chosen = next(order)
        measured = train_step(engine, [train[i] for i in chosen], options, tokenizer.pad_token_id)
        state.advance(options.global_batch_size, len(train))
        check_step(state, options, measured, [origin(i) for i in chosen])
        metrics.step(state, measured, ["train/loss", "train/accuracy", "reward/margin", "train/lr"])
        is_last, is_best = state.step == total_steps, False
        if held_out and (is_last or (options.eval_steps and state.step % options.eval_steps == 0)):
            is_best = evaluate_and_log()
        save_if_due(options, state, engines, is_best, is_last)

    # 4. What step 3, or another program, reads.
    export_model(engine, tokenizer, output / "final", load_base)


def train_step(
    engine, batch: Sequence[Example], options: DirectOptions, pad_token_id: int
) -> dict[str, Mean | float]:
    """One optimiser step on a global batch of records, of which this rank takes its micro-batches."""
    start, rate = time.perf_counter(), engine.get_lr()[0]
    found, norm = measure(engine, batch, options, pad_token_id, learn=True)
    seconds = time.perf_counter() - start
    return {
        **{name if "/" in name else f"train/{name}": value for name, value in found.items()},
        "train/lr": rate,
        "train/grad_norm": Mean(norm),
        "train/tokens_per_second": Mean(sum(example.row.length for example in batch), seconds),
        "time/step": Mean(seconds),
        "memory/peak_gib": peak_memory_gib(),
    }


if __name__ == "__main__":
    run_main(main)
