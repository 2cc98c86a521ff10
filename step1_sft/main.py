"""Step 1: supervised fine-tuning.

Trains a pretrained causal language model to maximise the likelihood of the response tokens of demonstrations.

    bash launch/step1_sft.sh --model_name_or_path DIR --train_data F.jsonl --output_dir OUT
"""

import time
from functools import partial

from torch import Tensor

from common.model.engine import backward_and_step, make_engine
from common.model.engine_protocol import Engine
from common.model.forward import label_pass, pad_token_id
from common.model.head import Targets
from common.model.loading import fit_to_model, load_causal_lm
from common.model.lora import add_adapters, check_adapters
from common.model.roles import policy_config
from common.model.sequence_parallel import check_heads, share_rows, unshared_rows
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.distributed import sum_over_ranks
from common.runtime.option_parser import parse_options
from common.runtime.options import world_size
from common.runtime.process import run_main
from common.runtime.row_groups import share_rows_among
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.expert_use import ExpertUse
from common.training.export import export_best, export_model
from common.training.loop import TrainingLoop
from common.training.means import Mean
from common.training.metrics import peak_memory_gib, phase_memory, training_flops, utilisation
from common.training.run_folder import check_folder
from step1_sft.data import Demonstration, collate, load_demonstrations
from step1_sft.evaluate import answers_as_markdown, evaluate, greedy_answers
from step1_sft.loss import training_loss
from step1_sft.options import SFTOptions
from step1_sft.packing import Row, check_packing, micro_batches


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(SFTOptions)
    share_rows_among(options.sequence_parallel)
    zero = load_zero_config(options.zero_config, options, options.learning_rate)
    config = policy_config(options.model_name_or_path, "model_name_or_path")
    check_heads(config, options.model_name_or_path)
    options = fit_to_model(options, config)
    check_adapters(options.model_name_or_path, options, zero)
    check_folder(options)
    tokenizer = load_tokenizer(options.model_name_or_path)
    encoder = SegmentEncoder(tokenizer)
    train, held_out = load_demonstrations(options, encoder)
    loop = TrainingLoop(options, train, held_out, {"tokenizer": tokenizer}, options.global_batch_size)

    # 2. Load the model and resume.
    model = add_adapters(load_causal_lm(options.model_name_or_path, tokenizer, zero), options, options.seed)
    engine = make_engine(model, zero, options, options.learning_rate, loop.total_steps)
    if options.packing:
        check_packing(engine, options.max_length)
    share_rows(engine)
    loop.resume({"policy": engine}, "demonstrations")
    load_base = partial(load_causal_lm, options.model_name_or_path, tokenizer, unpartitioned(zero))

    def evaluate_and_log() -> bool:
        metrics = evaluate(engine, held_out, options)
        is_best = loop.log_evaluation(metrics, ["eval/loss", "eval/perplexity"])
        with unshared_rows(engine):
            samples = greedy_answers(engine, held_out[: options.num_samples], encoder, options)
        loop.writer.text(loop.state.step, "samples", answers_as_markdown(samples))
        if is_best:
            export_best(engine, tokenizer, loop.folder / "best", load_base)
        return is_best

    # 3. Train.
    if loop.first_evaluation_is_due:
        evaluate_and_log()
    for indices in loop.batches():
        metrics = train_step(engine, [train[i] for i in indices], options)
        loop.finish_step(metrics, ["train/loss", "train/lr", "train/tokens_per_second"])
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 4. Export the model for the other stages.
    export_model(engine, tokenizer, loop.folder / "final", load_base)


def train_step(engine: Engine, batch: list[Demonstration], options: SFTOptions) -> dict[str, Mean | float]:
    """Take one optimiser step; each rank processes its micro-batches of the global batch."""
    start, rate = time.perf_counter(), engine.get_lr()[0]
    lengths = [len(row.ids) for row in batch]
    num_tokens = sum(sum(row.is_trained) for row in batch)
    batches = micro_batches(lengths, options)
    total = padded = 0.0

    def predict(rows: list[Row]) -> tuple[Tensor, Tensor]:
        micro = collate([[batch[i] for i in row] for row in rows], pad_token_id(engine))
        targets = Targets(micro.labels, is_summed=options.token_loss == "nll")
        result = label_pass(engine, micro.input_ids, micro.positions, targets, micro.position_ids)
        return result.logprobs, micro.input_ids

    experts = ExpertUse(engine, predict, *zip(*batches, strict=True))
    for number, (rows, is_real) in enumerate(batches, start=1):
        logprobs, input_ids = predict(rows)
        loss = training_loss(logprobs, num_tokens, options.token_loss) * is_real
        total, padded = total + loss.detach(), padded + input_ids.numel()
        loss = loss + experts.loss(is_real)
        norm = backward_and_step(engine, loss, world_size(), is_last=number == len(batches))
    total, padded = sum_over_ranks(total, padded)
    seconds = time.perf_counter() - start
    return {
        "train/loss": Mean(total * num_tokens, num_tokens),
        **experts.metrics(),
        "train/lr": rate,
        "train/grad_norm": Mean(norm),
        "train/tokens_per_second": Mean(sum(lengths), seconds),
        "train/response_tokens_per_second": Mean(num_tokens, seconds),
        "train/padding_share": Mean(padded - sum(lengths), padded),
        **utilisation(training_flops(engine.module, lengths), seconds),
        "time/step": Mean(seconds),
        "memory/peak_gib": peak_memory_gib(),
        **phase_memory(),
    }


if __name__ == "__main__":
    run_main(main)
