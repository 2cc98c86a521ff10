"""Time, in plain PyTorch, the passes that a training step cannot avoid, and print one JSON line.

Usage: ``bare.py STAGE --config JSON``. Same model, data and batch as the trainers, batches in file order.
The step is the sum of these: forward, backward and AdamW for SFT, Reward and DPO; for PPO `generate`, one
pass each of reference, reward model and critic without gradients, then per epoch forward, backward and AdamW
of actor and critic. In bf16 the weights are bf16, without the fp32 master copy that a trainer keeps.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Config = dict[str, Any]
Batch = dict[str, Tensor]


def batches(config: Config, stage: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """The data in file order, padded to the longest of each batch, over and over."""
    records = [json.loads(line) for line in Path(config["data"]).read_text().splitlines()]
    tokenizer.padding_side = "left" if stage == "ppo" else "right"
    fields = {"sft": ["completion"], "ppo": []}.get(stage, ["chosen", "rejected"])
    size = config["batch_size"]
    collated = []
    for start in range(0, len(records) - size + 1, size):
        chunk = records[start : start + size]
        texts = [row["prompt"] + row[field] + tokenizer.eos_token for field in fields for row in chunk]
        texts = texts or [row["prompt"] for row in chunk]
        collated.append(tokenizer(texts, padding=True, return_tensors="pt"))
    return cycle([{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in collated])


def timed(work: Callable[[], Any], count: int, warmup: int) -> float:
    """Median seconds of one call."""
    seconds = []
    for _ in range(warmup + count):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds[warmup:])


def language_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy of the real tokens."""
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def pair_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Bradley-Terry loss; the first half of the batch is chosen."""
    chosen, rejected = model(**batch).logits.squeeze(-1).float().chunk(2)
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def preference_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """DPO, against a reference with log-probabilities 0; the first half of the batch is chosen."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(**batch).logits[:, :-1].float()
    logprobs = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    chosen, rejected = (logprobs * mask[:, 1:]).sum(1).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def train_step(
    model: PreTrainedModel, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None
) -> None:
    """Forward and backward, then AdamW if there is an optimizer."""
    loss().backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()


def supervised(config: Config, stage: str, model: PreTrainedModel, feed: Iterator[Batch]) -> dict[str, float]:
    """The passes of SFT, Reward or DPO."""
    loss = {"sft": language_loss, "reward": pair_loss, "direct": preference_loss}[stage]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"], fused=True)

    @torch.no_grad()
    def forward() -> None:
        loss(model, next(feed))

    def train(optimizer: torch.optim.Optimizer | None) -> None:
        train_step(model, lambda: loss(model, next(feed)), optimizer)

    count, warmup = config["steps"], config["warmup"]
    times = {
        "forward": timed(forward, count, warmup),
        "forward_backward": timed(lambda: train(None), count, warmup),
        "forward_backward_adamw": timed(lambda: train(optimizer), count, warmup),
    }
    return times | {"total": times["forward_backward_adamw"]}


def ppo(
    config: Config, actor: PreTrainedModel, critic: PreTrainedModel, feed: Iterator[Batch]
) -> dict[str, float]:
    """The passes of PPO; logits only where the response is, a value per position."""
    length, count, warmup = config["response_length"], config["steps"], config["warmup"]
    actor.generation_config.eos_token_id = None  # every response has full length
    prompts = next(feed)

    @torch.no_grad()
    def generate() -> Tensor:
        return actor.generate(**next(feed), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length)

    with torch.no_grad():
        ids = actor.generate(**prompts, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(ids[:, -length:])], dim=1)

    def policy_loss() -> Tensor:
        output = actor(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length + 1)
        logits = output.logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, ids[:, -length:].flatten())

    def value_loss() -> Tensor:
        backbone = getattr(critic, critic.base_model_prefix)
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return critic.score(hidden[:, -length - 1 : -1]).float().square().mean()

    times = {"rollout": timed(generate, count, warmup)}
    for name, model, loss in (("actor", actor, policy_loss), ("critic", critic, value_loss)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"], fused=True)
        with torch.no_grad():
            times[f"{name}_forward"] = timed(loss, count, warmup)
        times[f"{name}_train"] = timed(partial(train_step, model, loss, optimizer), count, warmup)
    times["score"] = times["actor_forward"] + 2 * times["critic_forward"]  # reference; two scorers
    times["train"] = config["ppo_epochs"] * (times["actor_train"] + times["critic_train"])
    return times | {"total": times["rollout"] + times["score"] + times["train"]}


def main() -> None:
    """Time the passes, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["sft", "reward", "direct", "ppo"])
    parser.add_argument("--config", type=json.loads, required=True)
    options = parser.parse_args()
    config, stage = options.config, options.stage
    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    dtype = torch.bfloat16 if config["precision"] == "bf16" else torch.float32
    feed = batches(config, stage, AutoTokenizer.from_pretrained(config["policy"]))
    policy = AutoModelForCausalLM.from_pretrained(config["policy"], dtype=dtype)
    scorer = AutoModelForSequenceClassification.from_pretrained(config["reward_model"], dtype=dtype)
    if stage == "ppo":
        times = ppo(config, policy, scorer, feed)
    else:
        times = supervised(config, stage, scorer if stage == "reward" else policy, feed)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": [times.pop("total")], "passes": times, "peak_gib": peak_kib / 2**20}))


if __name__ == "__main__":
    main()
