"""Step 3: proximal policy optimisation against the reward model, with a KL penalty to the SFT model.

    bash launch/step3_ppo.sh --actor_model_name_or_path OUT1/final --reward_model_name_or_path OUT2/final \
        --prompt_data F.jsonl --output_dir OUT3
"""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common.data.batching import batch_order, steps_in_epochs
from common.data.loading import load_examples
from common.generation.generate import check_generation
from common.model.ema import update_average
from common.model.families import check_scalar
from common.model.loading import load_causal_lm
from common.model.lora import check_adapters
from common.model.reward_ensemble import load_encoders
from common.model.roles import check_scalar_model, policy_config
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.distributed import (
    init_distributed,
    log,
    ranks_in_words,
    seed_everything,
)
from common.runtime.options import UserError, parse_options
from common.runtime.process import run_main, stop_between_steps
from common.text.prompts import Prompt, prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.checkpoint import save_checkpoint, save_if_due
from common.training.export import export_best, export_model
from common.training.means import step_values
from common.training.metrics import MetricWriter, peak_memory_gib
from common.training.resume import resume
from common.training.run_folder import check_folder, open_run
from common.training.stability import check_numbers
from common.training.train_state import TrainState, check_best_metric
from step3_ppo.kl_advice import advise, warn_of_penalty
from step3_ppo.metrics import as_markdown, evaluate, rollout_metrics, speed
from step3_ppo.models import build_models, load_critic
from step3_ppo.optimise import optimise
from step3_ppo.options import PPOOptions, check_options
from step3_ppo.ptx import PretrainingMix, load_texts
from step3_ppo.returns import estimate_advantages, kl_controller, shape_rewards
from step3_ppo.reward_functions import FunctionError, load_functions
from step3_ppo.rollout import sample_rollout
from step3_ppo.scoring import score_rollout

SHOWN_OF_EVALUATION = ["eval/score", "eval/gold", "eval/kl", "eval/length", "eval/distinct_2"]
SHOWN = ["reward/mean", "kl/mean", "response/length", "policy/entropy", "value/explained_var", "time/step"]


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(PPOOptions, required=["actor_model_name_or_path", "prompt_data"])
    check_options(options)
    functions = load_functions(options.reward_function, "reward_function")
    gold_function = load_functions(list(filter(None, [options.gold_function])), "gold_function")
    if options.gold_reward_model:
        check_scalar_model(options.gold_reward_model, "gold_reward_model")
    actor_zero = load_zero_config(
        options.actor_zero_config or options.zero_config, options, options.actor_learning_rate
    )
    critic_zero = load_zero_config(
        options.critic_zero_config or options.zero_config, options, options.critic_learning_rate
    )
    config = policy_config(options.actor_model_name_or_path, "actor_model_name_or_path")
    check_generation(options, config)
    check_adapters(options.actor_model_name_or_path, options)
    check_folder(options)
    tokenizer = load_tokenizer(options.actor_model_name_or_path)
    encoder = SegmentEncoder(tokenizer)
    reward_encoders = load_encoders(options, encoder)
    if options.has_critic and reward_encoders[:1] != [encoder]:
        check_scalar(config)  # the critic will stand on the actor's model
    convert = partial(
        prompt, encoder=encoder, max_length=options.max_prompt_length, overlong=options.overlong
    )
    train, held_out = load_examples(options.prompt_data, options, Prompt, convert)
    texts = load_texts(options, encoder)
    check_best_metric(options, held_out)
    init_distributed(options.timeout_minutes)
    tokenizers = {
        f"tokenizer of reward model {n}": e.tokenizer for n, e in enumerate(reward_encoders, start=1)
    }
    prompts_per_step = options.rollout_batch_size // options.samples_per_prompt
    total_steps = options.max_steps or steps_in_epochs(len(train), prompts_per_step, options.num_train_epochs)
    checkpoint = open_run(options, {"tokenizer": tokenizer, **tokenizers}, total_steps)

    # 2. The models, and where the run stands.
    seed_everything(options.seed, step=0)
    models = build_models(
        options, encoder, reward_encoders, functions, gold_function, actor_zero, critic_zero, total_steps
    )  # fmt: skip
    engines = {"actor": models.actor} | ({"critic": models.critic} if models.critic else {})
    state = resume(checkpoint, options, engines, total_steps)
    controllers = state.controllers
    kl = kl_controller(options, controllers)
    metrics = MetricWriter(options.output_dir, state.step, total_steps, options.logging_steps)
    log(f"{len(train)} prompts, {len(held_out)} held out, {total_steps} iterations on {ranks_in_words()}")

    output = Path(options.output_dir)
    load_actor = partial(
        load_causal_lm, options.actor_model_name_or_path, tokenizer, unpartitioned(actor_zero)
    )
    load_value = partial(
        load_critic, options, tokenizer, unpartitioned(critic_zero), reward_encoders[:1] == [encoder]
    )

    def evaluate_and_log() -> bool:
        seed_everything(options.seed, state.step)
        state.unevaluated = True  # for as long as a function may fail
        with progress_kept(options, state, engines):
            figures, found = evaluate(models, held_out, options)
        state.unevaluated = False
        metrics.log(state.step, figures, SHOWN_OF_EVALUATION)
        metrics.samples(state.step, found)
        metrics.text(state.step, "samples", as_markdown(found))
        if is_best := state.is_best(options.best_metric, figures):
            export_best(models.actor, tokenizer, output / "best", load_actor)
        return is_best

    def has_stalled() -> bool:
        return 0 < options.early_stopping <= state.evaluations_since_best

    if held_out and not options.export_only and (state.step == 0 or state.unevaluated):
        evaluate_and_log()
        if state.step:
            save_checkpoint(options, state, engines)

    order = batch_order(train.notes("length"), prompts_per_step, options.seed, state.step, grouped=False)
    pretraining = None
    if texts:
        taken = int(controllers.get("ptx_batches", 0))
        pretraining = PretrainingMix(texts, options, tokenizer.pad_token_id, taken)
    stop_between_steps()
    while state.step < total_steps and not options.export_only and not has_stalled():
        start, rate = time.perf_counter(), models.actor.get_lr()[0]
        step = state.step + 1
        seed_everything(options.seed, step)
        chosen = next(order)
        batch = [train[i] for i in chosen for _ in range(options.samples_per_prompt)]

        # 3. Sample, and have every model read the responses.
        rollout = sample_rollout(models.actor, encoder, batch, options, step)
        sampled = time.perf_counter()
        with progress_kept(options, state, engines):
            rollout, first_pass = score_rollout(models, batch, rollout, options, step)
        # 4. Per-token KL penalty, and the score on the last token.
        rewards, shaped = shape_rewards(rollout, options, controllers)
        # 5. Advantages over the whole rollout.
        advantages, returns = estimate_advantages(rollout, rewards, options, controllers)
        # 6. Clipped policy and value losses, several epochs.
        scored = time.perf_counter()
        stats = optimise(
            models, rollout, first_pass, advantages, returns, options, kl.coef, pretraining, step
        )
        if options.ema_decay:
            update_average(state.average, models.actor, options.ema_decay)
        seconds = sampled - start, scored - sampled, time.perf_counter() - scored

        # 7. Record.
        skipped = stats.pop("train/skipped_updates")
        found = rollout_metrics(models, rollout, returns) | shaped | stats | {"kl/coef": kl.coef}
        passes = options.ppo_epochs * stats["policy/updates"].value / options.updates_per_step
        found |= speed(rollout, seconds, passes)
        found |= {"train/lr": rate, "memory/peak_gib": peak_memory_gib()}
        alone = step_values(found)
        if step == 1:
            warn_of_penalty(alone, options)
        advise(state, step, alone, options)
        kl.update(alone["kl/mean"], options.rollout_batch_size)
        controllers["kl_coef"] = kl.coef
        if pretraining:
            controllers["ptx_batches"] = pretraining.taken
        state.advance(prompts_per_step, len(train))
        origins = [train.origin(i) for i in chosen]
        watched = alone["value/loss" if models.critic else "policy/approx_kl"]
        check_numbers(state, options, skipped, watched, origins)
        found["train/skipped_updates"] = state.skipped
        metrics.step(state, found, SHOWN)
        is_last, is_best = state.step == total_steps, False
        if held_out and (is_last or (options.eval_steps and state.step % options.eval_steps == 0)):
            is_best = evaluate_and_log()
        if has_stalled():
            metrics.flush(state, found, SHOWN)
        save_if_due(options, state, engines, is_best, is_last or has_stalled())
    if has_stalled():
        log(f"stopped early: {options.early_stopping} evaluations without a better {options.best_metric}")

    # 8. What other programs read.
    export_model(models.actor, tokenizer, output / "final", load_actor)
    if options.ema_decay:
        export_model(models.actor, tokenizer, output / "final_ema", load_actor, state.average)
    if models.critic:
        export_model(models.critic, tokenizer, output / "final_critic", load_value)


@contextlib.contextmanager
def progress_kept(options: PPOOptions, state: TrainState, engines: dict[str, Any]) -> Iterator[None]:
    """Around scoring: when a function of the user fails, a checkpoint of what was learnt before.

    Scoring changes neither the engines nor the state, so that the run goes on exactly. Raises UserError, on
    all ranks, that says from where.
    """
    try:
        yield
    except FunctionError as error:
        if state.step == 0:
            place = "begins again"
        elif save_checkpoint(options, state, engines):
            place = f"goes on after step {state.step}"
        else:
            place = "goes on from an older checkpoint"
        raise UserError(f"{error}; with its file corrected, the same command {place}") from error


if __name__ == "__main__":
    run_main(main)
