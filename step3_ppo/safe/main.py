"""Step 3 with a limit on the mean cost (Safe RLHF): PPO with a Lagrange multiplier.

    bash launch/step3_safe.sh --actor_model_name_or_path OUT1/final --reward_model_name_or_path OUT2/final \
        --cost_model_name_or_path COST/final --cost_limit 0 --prompt_data F.jsonl --output_dir OUT3
"""

from functools import partial

from common.data.loading import load_examples
from common.model.ema import update_ema_weights
from common.model.engine import states_away
from common.numeric.tensor_ops import masked_whiten
from common.runtime.option_parser import parse_options
from common.runtime.process import run_main
from common.text.prompts import Prompt, tokenize_prompt
from common.training.export import export_model
from common.training.loop import TrainingLoop
from common.training.means import step_values
from common.training.metrics import Phases, peak_memory_gib
from step3_ppo.errors import checkpoint_on_error
from step3_ppo.held_out import log_evaluation
from step3_ppo.kl_advice import advise, warn_of_penalty
from step3_ppo.metrics import rollout_metrics, speed
from step3_ppo.models import build_critic, build_models, check_inputs, export_models, load_critic
from step3_ppo.objectives import comparable_scores
from step3_ppo.optimise import optimise, optimise_critic
from step3_ppo.ptx import PretrainingMix, load_texts
from step3_ppo.returns import generalised, shape_rewards
from step3_ppo.rollout import sample_rollout
from step3_ppo.safe.costs import check_costs, cost_metrics, token_costs
from step3_ppo.safe.lagrangian import combined_advantages, next_multiplier
from step3_ppo.safe.options import SafeOptions
from step3_ppo.scoring import score_again, score_rollout
from step3_ppo.shared_prompt import share_prompts
from step3_ppo.state import PPOState

SHOWN_OF_EVALUATION = ["eval/score", "eval/cost", "eval/gold", "eval/kl", "eval/length", "eval/distinct_2"]
SHOWN = ["reward/mean", "cost/mean", "cost/lambda", "kl/mean", "response/length", "time/step"]


def main() -> None:
    # 1. Check options and data before a model is loaded.
    options, sources = check_inputs(parse_options(SafeOptions))
    cost_options, cost_sources = check_costs(options, sources)
    encoder = sources.encoder
    convert = partial(
        tokenize_prompt, encoder=encoder, max_length=options.max_prompt_length, overlong=options.overlong
    )
    train, held_out = load_examples(options.prompt_data, options, Prompt, convert)
    texts = load_texts(options, encoder)
    loop = TrainingLoop(
        options, train, held_out, sources.tokenizers | cost_sources.tokenizers,
        options.rollout_batch_size // options.samples_per_prompt, by_length=False,
        patience=options.early_stopping,
    )  # fmt: skip

    # 2. Load the models, a critic of rewards and one of costs, and resume.
    models = build_models(options, sources, loop.total_steps)
    cost_critic, cost_scorer = build_critic(cost_options, cost_sources, loop.total_steps)
    models.judges["cost"] = cost_scorer
    engines = {"actor": models.actor, "critic": models.critic, "cost_critic": cost_critic}
    loop.resume(engines, "prompts", "iterations")
    trained = [*engines.values()] * options.offload_states  # their states leave the device between updates
    state = PPOState.load(options, loop.state.controllers)
    multiplier = loop.state.controllers.get("lambda", options.lambda_init)
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

        # 3. Sample responses, and score them by reward and by cost.
        with checkpoint_on_error(loop), states_away(trained):
            rollout = sample_rollout(models.sampler, encoder, prompts, options, step)
            phases.end("rollout")
            loop.drop_step_if_stopped()
            rollout = share_prompts(models, rollout, options)
            rollout = score_rollout(models, prompts, rollout, options)
            costs = score_again(cost_critic, cost_scorer, encoder, prompts, rollout, options)
            loop.drop_step_if_stopped()
        # 4. Rewards as in PPO; the cost at the last token.
        rollout = comparable_scores(rollout, models.scorer, options, state)
        rewards, shaped = shape_rewards(rollout, models.scorer, options, state)
        # 5. Two advantages, combined by the multiplier.
        of_rewards, returns = generalised(rollout, rewards, options)
        of_costs, cost_returns = generalised(costs, token_costs(costs, options), options)
        advantages = combined_advantages(of_rewards, of_costs, multiplier)
        if options.whiten_advantages:
            advantages = masked_whiten(advantages, rollout.response_mask)
        # 6. Update actor and both critics.
        current = state.current(options)
        phases.end("score")
        with checkpoint_on_error(loop):
            stats = optimise(models, rollout, advantages, returns, current, state.kl, pretraining, step)
        updates = int(stats["policy/updates"].value)
        cost_stats = optimise_critic(cost_critic, costs, cost_returns, current, step, updates, "cost_value")
        if options.ema_decay:
            update_ema_weights(loop.state.average, models.actor, options.ema_decay)
        phases.end("train")

        # 7. Metrics, multiplier, checkpoint, evaluation.
        skipped = stats.pop("train/skipped_updates") + cost_stats.pop("train/skipped_updates")
        metrics = rollout_metrics(models, rollout, returns) | shaped | stats | cost_stats
        metrics |= cost_metrics(costs, cost_returns) | state.coefficients(current)
        metrics |= {"cost/lambda": multiplier, "cost/limit": options.cost_limit}
        metrics |= speed(rollout, phases.seconds, updates, options)
        metrics |= {"train/lr": rate, "memory/peak_gib": peak_memory_gib(), **phases.memory}
        values = step_values(metrics)
        if step == 1:
            warn_of_penalty(values, options)
        advise(loop.state, step, values, current)
        state.adapt(options, step, values)
        if step > current.critic_warmup_steps:  # until then the policy cannot lower the cost
            multiplier = next_multiplier(
                multiplier, values["cost/mean"], options.cost_limit, options.lambda_rate,
                options.lambda_min, options.lambda_max,
            )  # fmt: skip
        loop.state.controllers = state.plain() | {"lambda": multiplier}
        loop.finish_step(metrics, SHOWN, skipped, values["value/loss"])
        loop.save_if_due(is_best=loop.evaluation_is_due and evaluate_and_log())

    # 8. Export.
    export_models(models, options, sources, loop.folder, loop.state.average)
    load_base = partial(load_critic, cost_options, cost_sources)
    export_model(cost_critic, encoder.tokenizer, loop.folder / "final_cost_critic", load_base)


if __name__ == "__main__":
    run_main(main)
