"""Step 3: proximal policy optimisation against the reward model, with a KL penalty to the SFT model.

    bash launch/step3_ppo.sh --actor_model_name_or_path OUT1/final --reward_model_name_or_path OUT2/final \
        --prompt_data F.jsonl --output_dir OUT3
"""

import contextlib
import time
from collections.abc import Iterator
from functools import partial

from common.data.loading import load_examples
from common.generation.generate import fit_prompt_length
from common.model.ema import update_ema_weights
from common.model.families import check_scalar
from common.model.loading import load_causal_lm
from common.model.lora import check_adapters
from common.model.reward_ensemble import load_encoders
from common.model.roles import check_scalar_model, policy_config
from common.model.zero import load_zero_config, unpartitioned
from common.runtime.distributed import seed_everything
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import run_main
from common.text.prompts import Prompt, tokenize_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.training.export import export_best, export_model
from common.training.loop import TrainingLoop
from common.training.means import step_values
from common.training.metrics import peak_memory_gib
from common.training.run_folder import check_folder
from step3_ppo.kl_advice import advise, warn_of_penalty
from step3_ppo.metrics import as_markdown, evaluate, rollout_metrics, speed
from step3_ppo.models import build_models, load_critic
from step3_ppo.optimise import optimise
from step3_ppo.options import PPOOptions
from step3_ppo.ptx import PretrainingMix, load_texts
from step3_ppo.returns import estimate_advantages, shape_rewards
from step3_ppo.reward_functions import FunctionError, load_functions
from step3_ppo.rollout import sample_rollout
from step3_ppo.scoring import score_rollout
from step3_ppo.state import PPOState

SHOWN_OF_EVALUATION = ["eval/score", "eval/gold", "eval/kl", "eval/length", "eval/distinct_2"]
SHOWN = ["reward/mean", "kl/mean", "response/length", "policy/entropy", "value/explained_var", "time/step"]


def main() -> None:
    # 1. Check options and data before a model is loaded.
    options = parse_options(PPOOptions)
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
    options = fit_prompt_length(options, config)
    check_adapters(options.actor_model_name_or_path, options)
    check_folder(options)
    tokenizer = load_tokenizer(options.actor_model_name_or_path)
    encoder = SegmentEncoder(tokenizer)
    reward_encoders = load_encoders(options, encoder)
    if options.has_critic and reward_encoders[:1] != [encoder]:
        check_scalar(config)  # the critic starts from the actor's model
    convert = partial(
        tokenize_prompt, encoder=encoder, max_length=options.max_prompt_length, overlong=options.overlong
    )
    train, held_out = load_examples(options.prompt_data, options, Prompt, convert)
    texts = load_texts(options, encoder)
    tokenizers = {"tokenizer": tokenizer}
    for number, reward_encoder in enumerate(reward_encoders, start=1):
        tokenizers[f"tokenizer of reward model {number}"] = reward_encoder.tokenizer
    prompts_per_step = options.rollout_batch_size // options.samples_per_prompt
    loop = TrainingLoop(
        options, train, held_out, tokenizers, prompts_per_step, by_length=False,
        patience=options.early_stopping,
    )  # fmt: skip

    # 2. Load the models and resume.
    models = build_models(
        options, encoder, reward_encoders, functions, gold_function, actor_zero, critic_zero, loop.total_steps
    )  # fmt: skip
    engines = {"actor": models.actor} | ({"critic": models.critic} if models.critic else {})
    loop.resume(engines, "prompts", "iterations")
    state = PPOState.load(options, loop.state.controllers)
    pretraining = None
    if texts:
        pretraining = PretrainingMix(texts, options, state.ptx_batches)
    load_actor = partial(
        load_causal_lm, options.actor_model_name_or_path, tokenizer, unpartitioned(actor_zero)
    )
    load_value = partial(
        load_critic, options, tokenizer, unpartitioned(critic_zero), reward_encoders[:1] == [encoder]
    )

    def evaluate_and_log() -> bool:
        seed_everything(options.seed, loop.state.step)
        loop.state.unevaluated = True  # until the functions have succeeded
        with checkpoint_on_function_error(loop):
            figures, samples = evaluate(models, held_out, options)
        loop.state.unevaluated = False
        is_best = loop.log_evaluation(figures, SHOWN_OF_EVALUATION)
        loop.writer.samples(loop.state.step, samples)
        loop.writer.text(loop.state.step, "samples", as_markdown(samples))
        if is_best:
            export_best(models.actor, tokenizer, loop.folder / "best", load_actor)
        return is_best

    if loop.first_evaluation_is_due:
        evaluate_and_log()
        if loop.state.step:
            loop.save()
    for indices in loop.batches():
        start, rate = time.perf_counter(), models.actor.get_lr()[0]
        step = loop.state.step + 1
        batch = [train[i] for i in indices for _ in range(options.samples_per_prompt)]

        # 3. Sample and score responses.
        rollout = sample_rollout(models.actor, encoder, batch, options, step)
        sampled = time.perf_counter()
        with checkpoint_on_function_error(loop):
            rollout = score_rollout(models, batch, rollout, options)
        # 4. Rewards: KL penalty at every token, score at the last one.
        rewards, shaped = shape_rewards(rollout, options, state)
        # 5. Advantages.
        advantages, returns = estimate_advantages(rollout, rewards, options, state)
        # 6. Update with clipped policy and value losses, over several epochs.
        scored = time.perf_counter()
        stats = optimise(models, rollout, advantages, returns, options, state.kl, pretraining, step)
        if options.ema_decay:
            update_ema_weights(loop.state.average, models.actor, options.ema_decay)
        seconds = sampled - start, scored - sampled, time.perf_counter() - scored

        # 7. Metrics, checkpoint, evaluation.
        skipped = stats.pop("train/skipped_updates")
        figures = rollout_metrics(models, rollout, returns) | shaped | stats | {"kl/coef": state.kl.coef}
        passes = options.ppo_epochs * stats["policy/updates"].value / options.updates_per_step
        figures |= speed(rollout, seconds, passes)
        figures |= {"train/lr": rate, "memory/peak_gib": peak_memory_gib()}
        values = step_values(figures)
        if step == 1:
            warn_of_penalty(values, options)
        advise(loop.state, step, values, options)
        state.kl.update(values["kl/mean"], options.rollout_batch_size)
        if pretraining:
            state.ptx_batches = pretraining.taken
        loop.state.controllers = state.plain()
        watched = values["value/loss" if models.critic else "policy/approx_kl"]
        loop.finish_step(figures, SHOWN, skipped, watched)
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 8. Export.
    export_model(models.actor, tokenizer, loop.folder / "final", load_actor)
    if options.ema_decay:
        export_model(models.actor, tokenizer, loop.folder / "final_ema", load_actor, loop.state.average)
    if models.critic:
        export_model(models.critic, tokenizer, loop.folder / "final_critic", load_value)


@contextlib.contextmanager
def checkpoint_on_function_error(loop: TrainingLoop) -> Iterator[None]:
    """Save a checkpoint when a reward function fails.

    Scoring changes neither the engines nor the state, so the run resumes exactly. Raises UserError on all
    ranks, with the step from which the run resumes.
    """
    try:
        yield
    except FunctionError as error:
        if loop.state.step == 0:
            outcome = "starts again"
        elif loop.save():
            outcome = f"resumes after step {loop.state.step}"
        else:
            outcome = "resumes from an older checkpoint"
        raise UserError(f"{error}; correct its file; then the same command {outcome}") from error


if __name__ == "__main__":
    run_main(main)
