"""Held-out pairs, their judgement by a reward model, and the report on them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.data.multi_encoder import load_shared_records
from common.runtime.damaged_jsonl import read_metrics
from common.runtime.distributed import (
    log,
    rank,
)
from common.runtime.files import write_json
from common.runtime.options import CacheOptions, UserError
from common.text.record_formats import Record, agreement
from common.text.tokenizer import SegmentEncoder
from step2_reward.data import Preference, tokenize_preference
from step2_reward.evaluation.figures import Judged, measure
from step2_reward.evaluation.plots import plots
from step2_reward.evaluation.report_text import table
from step2_reward.evaluation.verdicts import in_words, verdicts


class Pairs(NamedTuple):
    """Records to judge models on, whole, as each encoder reads them."""

    origins: list[str]  # as `file:line`
    records: list[Record]
    rows: dict[SegmentEncoder, list[Preference]]


def load_pairs(
    sources: Sequence[str], encoders: Sequence[SegmentEncoder], options: CacheOptions, max_length: int,
    at_most: int = 0,
) -> Pairs:  # fmt: skip
    """Preferences of at most `max_length` tokens to every encoder, so that all models are judged on the same.

    at_most: take the first so many; 0: all. Raises UserError naming file and line of a bad record, when no
    record is left, and when every pair is a tie.
    """
    convert = partial(tokenize_preference, max_length=max_length, overlong="drop", use_margin=True)
    different = [*dict.fromkeys(encoders)]
    converts = [partial(convert, encoder=encoder) for encoder in different]
    found = load_shared_records(sources, options, Preference, converts, at_most)
    if all(is_tie for row in found.rows[0] for is_tie, *_ in row.pair_facts):
        raise UserError(f"{' '.join(sources)}: every pair is a tie, so there is no accuracy to measure")
    return Pairs(found.origins, found.records, dict(zip(different, found.rows, strict=True)))


def judge(data: Pairs, rows: Sequence[Preference], better: Tensor, worse: Tensor) -> Judged:
    """All pairs of the rows with their scores, (P,) each, and what the records say of them."""
    facts = [
        (row.response_lengths[i], row.response_lengths[j], margin, is_tie, origin.rpartition(":")[0], share)
        for origin, record, row in zip(data.origins, data.records, rows, strict=True)
        for share in [agreement(record)]
        for (i, j), (is_tie, margin, *_) in zip(row.pairs, row.pair_facts, strict=True)
    ]
    return Judged(better.numpy(), worse.numpy(), *(np.array(column) for column in zip(*facts, strict=True)))


def write_report(judged: Judged, reward_std: float | None, history: Path | None, folder: Path) -> None:
    """Print figures and verdicts, and on rank 0 write report.json, pictures and TensorBoard to a folder.

    reward_std: what the scores were divided by; None for those of an ensemble, which have no raw scores.
    history: metrics.jsonl of the model's training, if it is to be found. Raises UserError when there is
    nothing to measure.
    """
    if rank() != 0:
        return
    from torch.utils.tensorboard import SummaryWriter

    lines, problems = read_metrics(history) if history else ([], [])
    for problem in problems:
        log(problem)
    try:
        figures = measure(judged, reward_std or 1.0)
    except ValueError as error:
        raise UserError(f"no report in {folder}: {error}") from None
    is_ensemble = reward_std is None
    found = verdicts(figures, lines, is_ensemble)
    log(f"\n{table(figures)}\n\n{in_words(found, figures, lines, is_ensemble)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", figures | {"verdicts": [verdict._asdict() for verdict in found]})
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for name, figure in plots(judged, figures).items():
            figure.savefig(folder / f"{name}.png", dpi=150)
            board.add_figure(f"eval/{name}", figure)
    log(f"\nreport.json and pictures: {folder}")
