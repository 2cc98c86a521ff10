"""Step 1: supervised fine-tuning.

Teaches a pretrained causal language model to answer, by maximum likelihood of the response tokens of
demonstrations.

    bash launch/step1_sft.sh --model_name_or_path DIR --train_data F.jsonl --output_dir OUT
"""

import time
from functools import partial
from pathlib import Path

from common.data.batching import batch_order, steps_in_epochs
from common.data.loading import load_examples
from common.model.engine import backward_and_step, make_engine
from common.model.forward import base_model, logits_and_balance
from common.model.load_balancing import has_balance_loss
from common.model.loading import load_causal_lm, longest_input
from common.model.lora import add_adapters, check_adapters
from common.model.roles import policy_config
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.distributed import init_distributed, log, ranks_in_words, seed_everything, sum_over_ranks
from common.runtime.option_checks import check_held_out
from common.runtime.options import parse_options, world_size
from common.runtime.process import run_main, stop_between_steps
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.checkpoint import save_if_due
from common.training.export import export_best, export_model
from common.training.means import Mean
from common.training.metrics import MetricWriter, peak_memory_gib, training_flops, utilisation
from common.training.resume import resume
from common.training.run_folder import check_folder, open_run
from common.training.stability import check_step
from common.training.train_state import check_best_metric
from step1_sft.data import Demonstration, collate, demonstration
from step1_sft.evaluate import as_markdown, evaluate, sample_answers
from step1_sft.loss import sft_loss
from step1_sft.options import SFTOptions
from step1_sft.packing import check_packing, micro_batches


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(SFTOptions, required=["model_name_or_path", "train_data"])
    check_held_out(options)
    zero = load_zero_config(options.zero_config, options, options.learning_rate)
    config = policy_config(options.model_name_or_path, "model_name_or_path")
    options.max_length = longest_input(config, options.max_length, "max_length")
    check_adapters(options.model_name_or_path, options)
    check_folder(options)
    tokenizer = load_tokenizer(options.model_name_or_path)
    encoder = SegmentEncoder(tokenizer)
    convert = partial(
        demonstration, encoder=encoder, max_length=options.max_length, overlong=options.overlong,
        loss_on=options.loss_on,
    )  # fmt: skip
    train, held_out = load_examples(options.train_data, options, Demonstration, convert)
    check_best_metric(options, held_out)
    init_distributed(options.timeout_minutes)
    total_steps = options.max_steps or steps_in_epochs(
        len(train), options.global_batch_size, options.num_train_epochs
    )
    checkpoint = open_run(options, {"tokenizer": tokenizer}, total_steps)

    # 2. The model, and where the run stands.
    lengths = train.notes("length")
    seed_everything(options.seed, step=0)
    model = add_adapters(load_causal_lm(options.model_name_or_path, tokenizer, zero), options, options.seed)
    engine = make_engine(model, zero, options, options.learning_rate, total_steps)
    if options.packing:
        check_packing(engine, options.max_length)
    engines = {"policy": engine}
    state = resume(checkpoint, options, engines, total_steps)
    metrics = MetricWriter(options.output_dir, state.step, total_steps, options.logging_steps)
    output = Path(options.output_dir)
    load_base = partial(load_causal_lm, options.model_name_or_path, tokenizer, unpartitioned(zero))
    log(f"{len(train)} demonstrations, {len(held_out)} held out, {total_steps} steps on {ranks_in_words()}")

    def evaluate_and_log() -> bool:
        found = evaluate(engine, held_out, options, tokenizer.pad_token_id)
        metrics.log(state.step, found, ["eval/loss", "eval/perplexity"])
        samples = sample_answers(engine, held_out[: options.num_samples], encoder, options.sample_length)
        metrics.text(state.step, "samples", as_markdown(samples))
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
        check_step(state, options, measured, [train.origin(i) for i in chosen])
        metrics.step(state, measured, ["train/loss", "train/lr", "train/tokens_per_second"])
        is_last, is_best = state.step == total_steps, False
        if held_out and (is_last or (options.eval_steps and state.step % options.eval_steps == 0)):
            is_best = evaluate_and_log()
        save_if_due(options, state, engines, is_best, is_last)

    # 4. What the other stages read.
    export_model(engine, tokenizer, output / "final", load_base)


def train_step(
    engine, batch: list[Demonstration], options: SFTOptions, pad_token_id: int
) -> dict[str, Mean | float]:
    """One optimiser step on a global batch, of which this rank takes its micro-batches."""
    start, rate = time.perf_counter(), engine.get_lr()[0]
    lengths = [len(row.ids) for row in batch]
    num_tokens = sum(sum(row.is_trained) for row in batch)
    mine = micro_batches(lengths, options)
    total = balance = padded = 0.0
    for number, rows in enumerate(mine, start=1):
        # A rank may be left without rows in a round. It takes part for nothing: ZeRO needs every rank.
        micro = collate([[batch[i] for i in row] for row in rows or [[0]]], pad_token_id)
        logits, balancing = logits_and_balance(engine, micro.input_ids, micro.positions, micro.position_ids)
        balancing = balancing * bool(rows) / sum(lengths)
        loss = sft_loss(logits, micro.labels, num_tokens) * bool(rows) + balancing
        norm = backward_and_step(engine, loss, world_size(), is_last=number == len(mine))
        total, balance = total + loss.detach(), balance + balancing.detach()
        padded += micro.input_ids.numel()
    total, balance, padded = sum_over_ranks(total, balance, padded)
    seconds = time.perf_counter() - start
    return {
        "train/loss": Mean(total * num_tokens, num_tokens),
        **({"train/aux_loss": Mean(balance)} if has_balance_loss(base_model(engine)) else {}),
        "train/lr": rate,
        "train/grad_norm": Mean(norm),
        "train/tokens_per_second": Mean(sum(lengths), seconds),
        "train/response_tokens_per_second": Mean(num_tokens, seconds),
        "train/padding_share": Mean(padded - sum(lengths), padded),
        **utilisation(training_flops(engine.module, lengths), seconds),
        "time/step": Mean(seconds),
        "memory/peak_gib": peak_memory_gib(),
    }


if __name__ == "__main__":
    run_main(main)
