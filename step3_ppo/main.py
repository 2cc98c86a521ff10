"""Step 3: proximal policy optimisation against the reward model, with a KL penalty to the SFT model.

    bash launch/step3_ppo.sh --actor_model_name_or_path OUT1/final --reward_model_name_or_path OUT2/final \
        --prompt_data F.jsonl --output_dir OUT3
"""

from functools import partial

from common.data.loading import load_examples
from common.model.ema import update_ema_weights
from common.model.engine import states_away
from common.runtime.option_parser import parse_options
from common.runtime.process import run_main
from common.text.prompts import Prompt, tokenize_prompt
from common.training.loop import TrainingLoop
from common.training.means import step_values
from common.training.metrics import Phases, peak_memory_gib
from step3_ppo.errors import checkpoint_on_error
from step3_ppo.held_out import log_evaluation
from step3_ppo.kl_advice import advise, warn_of_penalty
from step3_ppo.metrics import rollout_metrics, speed
from step3_ppo.models import build_models, check_inputs, export_models
from step3_ppo.objectives import comparable_scores
from step3_ppo.optimise import optimise
from step3_ppo.options import PPOOptions
from step3_ppo.ptx import PretrainingMix, load_texts
from step3_ppo.redraw import redraw_equal_groups
from step3_ppo.returns import estimate_advantages, shape_rewards
from step3_ppo.rollout import sample_rollout
from step3_ppo.scoring import score_rollout
from step3_ppo.shared_prompt import share_prompts
from step3_ppo.state import PPOState

SHOWN_OF_EVALUATION = ["eval/score", "eval/gold", "eval/kl", "eval/length", "eval/distinct_2"]
SHOWN = ["reward/mean", "kl/mean", "response/length", "policy/entropy", "value/explained_var", "time/step"]


def main() -> None:
    # 1. Check options and data before a model is loaded.
    options, sources = check_inputs(parse_options(PPOOptions))
    encoder = sources.encoder
    convert = partial(
        tokenize_prompt, encoder=encoder, max_length=options.max_prompt_length, overlong=options.overlong
    )
    train, held_out = load_examples(options.prompt_data, options, Prompt, convert)
    texts = load_texts(options, encoder)
    prompts_per_step = options.rollout_batch_size // options.samples_per_prompt
    loop = TrainingLoop(
        options, train, held_out, sources.tokenizers, prompts_per_step, by_length=False,
        patience=options.early_stopping,
    )  # fmt: skip

    # 2. Load the models and resume.
    models = build_models(options, sources, loop.total_steps)
    engines = {"actor": models.actor} | ({"critic": models.critic} if models.critic else {})
    loop.resume(engines, "prompts", "iterations")
    trained = [*engines.values()] * options.offload_states  # their states leave the device between updates
    state = PPOState.load(options, loop.state.controllers)
    pretraining = PretrainingMix(texts, options, state) if texts else None

    evaluate_and_log = partial(
        log_evaluation, loop, models, held_out, options, sources, trained, state, SHOWN_OF_EVALUATION
    )
    if loop.first_evaluation_is_due:
        evaluate_and_log()
        if loop.state.step:
            loop.save()
    for indices in loop.batches():
        phases, rate = Phases(), models.actor.get_lr()[0]
        step = loop.state.step + 1
        prompts = [train[i] for i in indices for _ in range(options.samples_per_prompt)]

        # 3. Sample and score responses.
        with checkpoint_on_error(loop), states_away(trained):
            rollout = sample_rollout(models.sampler, encoder, prompts, options, step)
            phases.end("rollout")
            loop.drop_step_if_stopped()
            rollout = share_prompts(models, rollout, options)
            rollout = score_rollout(models, prompts, rollout, options)
            rollout, redrawn = redraw_equal_groups(
                models, train, indices, rollout, options, step, loop.drop_step_if_stopped
            )
            loop.drop_step_if_stopped()
        rollout = comparable_scores(rollout, models.scorer, options, state)
        # 4. Rewards: KL penalty at every token, score at the last one.
        rewards, shaped = shape_rewards(rollout, models.scorer, options, state)
        # 5. Advantages.
        advantages, returns = estimate_advantages(rollout, rewards, options, state)
        # 6. Update with clipped policy and value losses, over several epochs.
        current = state.current(options)
        phases.end("score")
        with checkpoint_on_error(loop):
            stats = optimise(models, rollout, advantages, returns, current, state.kl, pretraining, step)
        if options.ema_decay:
            update_ema_weights(loop.state.average, models.actor, options.ema_decay)
        phases.end("train")

        # 7. Metrics, checkpoint, evaluation.
        skipped = stats.pop("train/skipped_updates")
        metrics = rollout_metrics(models, rollout, returns) | redrawn | shaped | stats
        metrics |= state.coefficients(current)
        metrics |= speed(rollout, phases.seconds, stats["policy/updates"].value, options)
        metrics |= {"train/lr": rate, "memory/peak_gib": peak_memory_gib(), **phases.memory}
        values = step_values(metrics)
        if step == 1:
            warn_of_penalty(values, options)
        advise(loop.state, step, values, current)
        state.adapt(options, step, values)
        loop.state.controllers = state.plain()
        watched = values["value/loss" if models.critic else "policy/approx_kl"]
        loop.finish_step(metrics, SHOWN, skipped, watched)
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 8. Export.
    export_models(models, options, sources, loop.folder, loop.state.average)


if __name__ == "__main__":
    run_main(main)
