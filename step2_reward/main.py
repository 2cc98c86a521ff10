"""Step 2: the reward model.

Trains the SFT model with a scalar head to score preferred responses higher.

    bash launch/step2_reward.sh --model_name_or_path OUT1/final --train_data F.jsonl --output_dir OUT2
"""

import time
from functools import partial

from torch import nn

from common.data.batching import deal, micro_batch
from common.model.engine import backward_and_step, make_engine
from common.model.engine_protocol import Engine
from common.model.loading import fit_to_model, load_scalar_model
from common.model.lora import add_adapters, check_adapters
from common.model.roles import backbone_config
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.distributed import rank, sum_over_ranks
from common.runtime.option_parser import parse_options
from common.runtime.options import world_size
from common.runtime.process import Stopped, run_main, stop_anywhere, stop_between_steps
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.expert_use import ExpertUse
from common.training.export import export_best, export_model
from common.training.loop import TrainingLoop
from common.training.means import Mean
from common.training.metrics import peak_memory_gib, phase_memory
from common.training.run_folder import check_folder
from step2_reward.centring import centre, load_centre_rows, mark_objective, set_centre
from step2_reward.data import Layout, Preference, collate, load_preferences
from step2_reward.evaluation.report import collect_pairs, load_pairs, write_report
from step2_reward.evaluation.scores import evaluate, score_pairs
from step2_reward.lm_regulariser import best_response_logprobs, check_language_model, load_language_head
from step2_reward.loss import centring_loss, harm_loss, language_loss, pairwise_loss
from step2_reward.options import RewardOptions
from step2_reward.shared_prompt import choose_layout, pair_scores_and_states


def main() -> None:
    # 1. Validate all inputs before loading a model.
    options = parse_options(RewardOptions)
    zero = load_zero_config(options.zero_config, options, options.learning_rate)
    config = backbone_config(options.model_name_or_path, "model_name_or_path")
    options = fit_to_model(options, config)
    check_adapters(options.model_name_or_path, options, zero)
    check_language_model(options)
    check_folder(options)
    tokenizer = load_tokenizer(options.model_name_or_path)
    encoder = SegmentEncoder(tokenizer)
    train, held_out = load_preferences(options, encoder)
    centre_rows = load_centre_rows(options, encoder, train)
    golden = None
    if options.golden_data:
        golden = load_pairs(
            options.golden_data, [encoder], options, options.max_length, objective=options.objective
        )
    loop = TrainingLoop(options, train, held_out, {"tokenizer": tokenizer}, options.global_batch_size)

    # 2. Load the model and resume.
    model = load_scalar_model(options.model_name_or_path, tokenizer, zero, options.seed)
    set_centre(model, 0.0, 1.0)  # raw scores during training; centred before each export
    mark_objective(model, options.objective)
    model = add_adapters(model, options, options.seed)
    engine = make_engine(model, zero, options, options.learning_rate, loop.total_steps)
    language_head = load_language_head(options, tokenizer, zero)
    layout = choose_layout(engine, train, options)
    loop.resume({"reward": engine}, "preferences")
    load_base = partial(load_scalar_model, options.model_name_or_path, tokenizer, unpartitioned(zero))

    def evaluate_and_log() -> bool:
        metrics = evaluate(engine, held_out, micro_batch(options), layout)
        is_best = loop.log_evaluation(metrics, ["eval/loss", "eval/accuracy", "eval/margin"])
        if is_best:
            write_best()
        return is_best

    def write_best() -> None:
        loop.state.best_unwritten = not centre(engine, centre_rows, options)
        if not loop.state.best_unwritten:
            export_best(engine, tokenizer, loop.folder / "best", load_base)
            set_centre(engine.module, 0.0, 1.0)

    # 3. Train.
    if loop.first_evaluation_is_due:
        evaluate_and_log()
        if loop.state.best_unwritten:
            raise Stopped("Stopped before the first step. Run the same command to start again.")
    elif loop.state.best_unwritten and not options.export_only:
        write_best()
    for indices in loop.batches():
        metrics = train_step(engine, [train[i] for i in indices], options, layout, language_head)
        loop.finish_step(metrics, ["train/loss", "train/accuracy", "train/lr"])
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 4. Preferences determine scores up to a constant: set it so that demonstrations have mean score 0. The
    #    zero of a cost model has a meaning and stays.
    if not centre(engine, centre_rows, options):
        loop.stop_after_training()
    export_model(engine, tokenizer, loop.folder / "final", load_base)

    # 5. Report on the golden pairs.
    if golden:
        stop_anywhere(
            f"Stopped. {loop.folder}/final is written, the report on --golden_data is not."
            " Run the same command to write it."
        )
        rows = golden.rows[encoder]
        judged = collect_pairs(golden, rows, *score_pairs(engine, rows, micro_batch(options), layout))
        std = engine.module.config.reward_std
        stop_between_steps()  # rank 0 writes, the others wait for it
        write_report(judged, std, loop.folder / "metrics.jsonl", loop.folder / "golden")


def train_step(
    engine: Engine, records: list[Preference], options: RewardOptions, layout: Layout,
    language_head: nn.Module | None,
) -> dict[str, Mean | float]:  # fmt: skip
    """Take one optimiser step; each rank processes its micro-batches of the global batch."""
    start, rate = time.perf_counter(), engine.get_lr()[0]
    shapes = layout.shapes(records)
    lengths = [width for _, width in shapes]
    batches = deal(range(len(records)), lengths, micro_batch(options), rank(), world_size(), shapes)
    num_tokens = sum(row.language_length for row in records)
    total = right = decided = encoded = padded = lm_total = 0.0
    micros = [collate([records[i] for i in batch_indices], layout) for batch_indices in batches]
    experts = ExpertUse(engine, partial(pair_scores_and_states, engine), micros)
    for number, micro in enumerate(micros, start=1):
        better, worse, states = pair_scores_and_states(engine, micro)  # (P,), (P,), (R, T, hidden)
        targets = options.label_smoothing + (1.0 - 2.0 * options.label_smoothing) * micro.targets
        losses = pairwise_loss(better, worse, micro.margins, targets)
        if options.objective == "cost":
            losses = losses + harm_loss(better, micro.better_signs) + harm_loss(worse, micro.worse_signs)
        if options.centre_coef:
            losses = losses + options.centre_coef * centring_loss(better, worse)
        loss = (losses * micro.weights).sum() / len(records)
        if language_head:
            language = language_loss(best_response_logprobs(language_head, states, micro), num_tokens)
            loss, lm_total = loss + options.lm_loss_coef * language, lm_total + language.detach()
        balanced = loss + experts.loss()
        norm = backward_and_step(engine, balanced, world_size(), is_last=number == len(batches))
        total, right = total + loss.detach(), right + ((better > worse) & ~micro.is_tie).sum()
        decided = decided + (~micro.is_tie).sum()
        encoded, padded = encoded + (micro.segments >= 0).sum(), padded + micro.segments.numel()
    total, right, decided, encoded, padded, lm_total = sum_over_ranks(
        total, right, decided, encoded, padded, lm_total
    )
    seconds = time.perf_counter() - start
    return {
        "train/loss": Mean(total * len(records), len(records)),
        "train/accuracy": Mean(right, decided),
        **({"train/lm_loss": Mean(lm_total * num_tokens, num_tokens)} if language_head else {}),
        **experts.metrics(),
        "train/lr": rate,
        "train/grad_norm": Mean(norm),
        "train/tokens_per_second": Mean(encoded, seconds),
        "train/padding_share": Mean(padded - encoded, padded),
        "time/step": Mean(seconds),
        "memory/peak_gib": peak_memory_gib(),
        **phase_memory(),
    }


if __name__ == "__main__":
    run_main(main)
