"""ILQL: implicit language Q-learning, in place of steps 2 and 3.

Trains a policy with Q and V heads on scored responses, without sampling. Decoding adds the advantage to the
log-policy.

    bash launch/step2_ilql.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.batching import deal, micro_batch
from common.data.loading import load_examples
from common.model.engine import backward_and_step, make_engine
from common.model.engine_protocol import Engine
from common.model.forward import pad_token_id
from common.model.loading import fit_to_model, load_causal_lm
from common.model.lora import add_adapters, check_adapters
from common.model.q_heads import save_heads
from common.model.roles import policy_config
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
from step2_reward.ilql.data import Scale, ScoredResponse, collate, scale_of, tokenize_scored
from step2_reward.ilql.objective import batch_loss, evaluate, figures
from step2_reward.ilql.options import ILQLOptions
from step2_reward.ilql.targets import (
    add_heads,
    head_weights,
    load_targets,
    move_targets,
    warn_of_slow_targets,
)

SHOWN = ["train/loss", "train/q_loss", "train/v_loss", "train/score_loss"]
SHOWN_OF_EVALUATION = ["eval/loss", "eval/q_loss", "eval/v_loss", "eval/score_loss"]


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(ILQLOptions)
    zero = load_zero_config(options.zero_config, options, options.learning_rate)
    options = fit_to_model(options, policy_config(options.model_name_or_path, "model_name_or_path"))
    check_adapters(options.model_name_or_path, options, zero)
    check_folder(options)
    tokenizer = load_tokenizer(options.model_name_or_path)
    convert = partial(
        tokenize_scored, encoder=SegmentEncoder(tokenizer), max_length=options.max_length,
        overlong=options.overlong,
    )  # fmt: skip
    train, held_out = load_examples(options.train_data, options, ScoredResponse, convert)
    scale = scale_of(train, options.standardise_scores, options.train_data)
    loop = TrainingLoop(options, train, held_out, {"tokenizer": tokenizer}, options.global_batch_size)
    warn_of_slow_targets(options.alpha, loop.total_steps // options.steps_for_target_q_sync)

    # 2. Load the model, add the heads, and resume. The target heads are beside the engine.
    load_base = partial(load_causal_lm, options.model_name_or_path, tokenizer)
    model = add_heads(add_adapters(load_base(zero), options, options.seed), options.seed)
    engine = make_engine(model, zero, options, options.learning_rate, loop.total_steps)
    loop.resume({"policy": engine}, "records")
    targets = load_targets(engine, loop.state.average, is_resumed=loop.checkpoint is not None)
    write_heads = partial(save_with_targets, targets=targets, options=options)
    export: dict[str, Any] = {"load_base": partial(load_base, unpartitioned(zero)), "write_more": write_heads}

    def evaluate_and_log() -> bool:
        metrics = evaluate(engine, targets, held_out, micro_batch(options), scale, options)
        is_best = loop.log_evaluation(metrics, SHOWN_OF_EVALUATION)
        if is_best:
            export_best(engine, tokenizer, loop.folder / "best", **export)
        return is_best

    # 3. Train.
    if loop.first_evaluation_is_due:
        evaluate_and_log()
    for indices in loop.batches():
        metrics = train_step(engine, targets, [train[i] for i in indices], scale, options)
        if (loop.state.step + 1) % options.steps_for_target_q_sync == 0:
            move_targets(targets, engine, options.alpha)
        loop.finish_step(metrics, SHOWN)
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 4. Export the model and its heads.
    export_model(engine, tokenizer, loop.folder / "final", **export)


def train_step(
    engine: Engine, targets: nn.ModuleList, rows: Sequence[ScoredResponse], scale: Scale, options: ILQLOptions
) -> dict[str, Mean | float]:
    """Take one optimiser step; each rank processes its micro-batches of the global batch."""
    start, rate = time.perf_counter(), engine.get_lr()[0]
    lengths, num_actions = [row.length for row in rows], sum(row.num_actions for row in rows)
    batches = deal(range(len(rows)), lengths, micro_batch(options), rank(), world_size())
    sums = torch.zeros(10, dtype=torch.float64)
    micros = [collate([rows[i] for i in indices], pad_token_id(engine), scale) for indices in batches]
    measure = partial(batch_loss, engine, targets, options=options)
    experts = ExpertUse(engine, measure, micros)
    for number, micro in enumerate(micros, start=1):
        loss, batch_sums = measure(micro)
        loss = loss / num_actions + experts.loss()
        norm = backward_and_step(engine, loss, world_size(), is_last=number == len(batches))
        sums += batch_sums
    metrics = figures(sum_over_ranks(*sums), num_actions)
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


def save_with_targets(
    folder: Path, state: dict[str, Tensor], targets: nn.ModuleList, options: ILQLOptions
) -> None:
    """Write the heads of an export, and take them out of the model's state."""
    save_heads(folder, head_weights(state), targets.state_dict(), options.ilql_beta)


if __name__ == "__main__":
    run_main(main)
