"""Scoring and updates of a rollout, with a row per response and with responses that share their prompt.

    python tests/bench/shared_prompts.py --tokenizer DIR [--prompt_tokens 45] [--response_tokens 48]
        [--samples 4]

Actor, reference and reward model are Llamas of one size with random weights; RLOO, one epoch, no optimiser
step. The two layouts alternate. Prints seconds of the processor, the least of all rounds, and the ratio.
"""

import argparse
import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.model.options import EnsembleOptions
from common.model.reward_ensemble import RewardModel
from common.text.prompts import Prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from step3_ppo import optimise as updates
from step3_ppo.kl_penalty import KLPenalty
from step3_ppo.models import Models, Scorer
from step3_ppo.options import PPOOptions
from step3_ppo.rollout import Rollout, policy_pass
from step3_ppo.scoring import score_rollout
from step3_ppo.shared_prompt import share_prompts
from tests.step3_ppo.rollouts import rollout_of


def make_models(sizes: str, tokenizer: str) -> Models:
    hidden, layers, heads, vocabulary = map(int, sizes.split(","))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers, num_labels=1,
        num_attention_heads=heads, vocab_size=vocabulary, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    actor, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    for policy in (actor, reference):
        policy.num_tokens = vocabulary
    reward = AutoModelForSequenceClassification.from_config(config).eval()
    encoder = SegmentEncoder(load_tokenizer(tokenizer))
    scorer = Scorer([RewardModel(encoder, lambda: contextlib.nullcontext(reward))], [], EnsembleOptions())
    actor.lr_scheduler = SimpleNamespace(step=lambda: None)
    return Models(actor, actor, None, reference, scorer, {}, encoder)


def make_rollout(actor: nn.Module, arguments: argparse.Namespace) -> Rollout:
    """Random tokens, with their log-probabilities."""
    count, start, length = (
        arguments.prompts * arguments.samples,
        arguments.prompt_tokens,
        arguments.response_tokens,
    )
    ids = torch.randint(10, actor.num_tokens, (count, start + length))
    ids[:, :start] = ids[:: arguments.samples, :start].repeat_interleave(arguments.samples, 0)
    lengths = torch.randint(length // 2, length + 1, (count,))
    rollout = rollout_of(ids, torch.full((count,), start), lengths, torch.zeros(count, dtype=torch.bool))
    with torch.no_grad():
        logprobs = policy_pass(actor.eval(), rollout.rows(range(count)), 1.0).logprobs
    filled = rollout.scatter([[*range(count)]], [logprobs])
    return replace(rollout, logprobs=filled, behaviour_logprobs=filled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="Any; texts are not read.")
    parser.add_argument("--sizes", default="576,30,9,49152", help="Hidden size, layers, heads, vocabulary.")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=45)
    parser.add_argument("--response_tokens", type=int, default=48, help="The shortest have half as many.")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models, rows = make_models(arguments.sizes, arguments.tokenizer), arguments.prompts * arguments.samples
    rollout = make_rollout(models.actor, arguments)
    prompts = [Prompt(rollout.prompt(row), '{"prompt": "a"}') for row in range(rows)]
    advantages = torch.randn(rollout.logprobs.shape)
    options = PPOOptions(
        rollout_batch_size=rows, global_batch_size=rows, micro_batch_size=arguments.samples, ppo_epochs=1,
        samples_per_prompt=arguments.samples, advantage_estimator="rloo", generation_batch_size=rows,
        max_prompt_length=arguments.prompt_tokens, max_response_length=arguments.response_tokens,
    )  # fmt: skip

    def backward(engine: nn.Module, loss: torch.Tensor, ranks: int, is_last: bool) -> float | None:  # noqa: ARG001
        loss.backward()
        if is_last:
            engine.zero_grad()
        return 1.0 if is_last else None

    updates.backward_and_step = backward
    seconds: dict[str, list[tuple[float, float]]] = {"no": [], "yes": []}
    for how in ["no", "yes"] * (arguments.rounds + 1):  # the first round also checks the models
        laid_out = share_prompts(models, rollout, replace(options, share_prompts=how))
        times = [time.process_time()]
        scored = score_rollout(models, prompts, laid_out, options)
        times.append(time.process_time())
        updates.optimise(models, scored, advantages, None, options, KLPenalty(0.0), None, 1)
        times.append(time.process_time())
        seconds[how].append((times[1] - times[0], times[2] - times[1]))
    print(f"{'':<10}{'score':>8}{'train':>8}{'both':>8}")
    for how, pairs in seconds.items():
        score, train = (min(values) for values in zip(*pairs[1:], strict=True))
        print(f"{how:<10}{score:8.2f}{train:8.2f}{score + train:8.2f}")
    both = [min(map(sum, pairs[1:])) for pairs in seconds.values()]
    print(f"shared / separate: {both[1] / both[0]:.2f}")


if __name__ == "__main__":
    main()
