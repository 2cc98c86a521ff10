"""Held-out loss and sample answers of a language model."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from common.data import deal
from common.distributed import rank, sum_over_ranks
from common.engine import gathered
from common.models import response_logits
from common.options import world_size
from common.tokenization import SegmentEncoder
from step1_sft.data import Demonstration, collate
from step1_sft.loss import sft_loss


@torch.no_grad()
def evaluate(
    engine: Any, rows: Sequence[Demonstration], micro_batch: int, pad_token_id: int
) -> dict[str, float]:
    """eval/loss, the mean over all learnt tokens of all rows on all ranks, and its exponential."""
    engine.eval()
    lengths = [len(row.ids) for row in rows]
    total = count = 0.0
    for chosen in deal(range(len(rows)), lengths, micro_batch, rank(), world_size()):
        # A rank without rows in the last round still takes part in it: at ZeRO-3 a forward needs every rank.
        batch = collate([rows[i] for i in chosen] or rows[:1], pad_token_id)
        loss = sft_loss(response_logits(engine, batch.input_ids, batch.positions), batch.labels, num_tokens=1)
        if chosen:
            total, count = total + loss.item(), count + len(batch.labels)
    total, count = sum_over_ranks(total, count)
    engine.train()
    return {"eval/loss": total / count, "eval/perplexity": math.exp(min(total / count, 700.0))}


@torch.no_grad()
def sample_answers(
    engine: Any, rows: Sequence[Demonstration], encoder: SegmentEncoder, max_new_tokens: int
) -> str:
    """Greedy answers to the prompts of the rows, as Markdown."""
    engine.eval()
    lines = []
    with gathered(engine) as model:
        for row in rows:
            prompt = torch.tensor([row.prompt_ids], device=engine.device)  # (1, P)
            whole = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                synced_gpus=False,
            )
            answer = encoder.decode_response(row.prompt_ids, whole[0, prompt.shape[1] :].tolist())
            lines.append(
                f"**{encoder.tokenizer.decode(row.prompt_ids, skip_special_tokens=True)}**\n\n{answer}"
            )
    engine.train()
    return "\n\n---\n\n".join(lines)
