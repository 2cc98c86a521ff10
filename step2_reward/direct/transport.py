"""Alignment via optimal transport (AOT): rewards are sorted over the global batch."""

from collections.abc import Sequence
from itertools import islice
from typing import assert_never

import torch

from common.data.batching import pad_rows
from common.model.engine_protocol import Engine
from common.runtime.distributed import device
from step2_reward.direct.data import Example
from step2_reward.direct.logprobs import logprobs_of_all
from step2_reward.direct.loss import aot_partners, aot_unpaired_partners
from step2_reward.direct.options import DirectOptions


def with_partners(engine: Engine, examples: Sequence[Example], options: DirectOptions) -> list[Example]:
    """Give each pair of a global batch its partners, from a forward pass before training on it.

    So the loss does not depend on micro-batches and ranks (TRL sorts within a micro-batch). Every pair of a
    ranking, and either order of a tie or a soft label, is one sample of its own weight. Every rank must call
    it.
    """
    examples = [*examples]
    was_training = engine.training
    engine.eval()
    policy = logprobs_of_all(engine, examples, max(len(e.row.ranks) for e in examples), options)  # (B, K)
    engine.train(was_training)
    reference = pad_rows([example.logprobs for example in examples], 0.0).to(device())  # (B, K)
    pairs = [(i, pair.better, pair.worse) for i, example in enumerate(examples) for pair in example.row.pairs]
    record, better, worse = torch.tensor(pairs, device=device()).unbind(1)  # (P,) each
    log_ratios = policy - reference
    chosen, rejected = log_ratios[record, better], log_ratios[record, worse]
    match options.loss:
        case "aot":
            margins = reference[record, better] - reference[record, worse]
            partners = aot_partners(chosen, rejected, margins)
        case "aot_unpaired":
            partners = aot_unpaired_partners(chosen, rejected)
        case _:
            assert_never(options.loss)
    remaining = iter(partners.tolist())
    return [e._replace(partners=[*islice(remaining, len(e.row.pairs))]) for e in examples]
