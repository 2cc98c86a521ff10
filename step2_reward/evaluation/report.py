"""Loading of held-out pairs, and the report on their scores."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.data.multi_encoder import load_shared_records
from common.runtime.damaged_jsonl import read_metrics
from common.runtime.distributed import log, rank
from common.runtime.files import naming, write_json
from common.runtime.options import CacheOptions, UserError
from common.text.record_formats import Record, agreement
from common.text.tokenizer import SegmentEncoder
from step2_reward.data import Preference, converter
from step2_reward.evaluation.figures import ScoredPairs, reward_metrics
from step2_reward.evaluation.plots import plots
from step2_reward.evaluation.report_text import table
from step2_reward.evaluation.verdicts import detect_problems, format_verdicts
from step2_reward.options import Objective


class EvaluationPairs(NamedTuple):
    """Records for evaluation, without truncation, tokenised by each encoder."""

    origins: list[str]  # as `file:line`
    records: list[Record]
    rows: dict[SegmentEncoder, list[Preference]]


def load_pairs(
    sources: Sequence[str], encoders: Sequence[SegmentEncoder], options: CacheOptions, max_length: int,
    max_records: int = 0, objective: Objective = "reward",
) -> EvaluationPairs:  # fmt: skip
    """Load the preferences of at most `max_length` tokens for every encoder, so that all models get the same.

    max_records: take the first ones only; 0: all. objective: of the models; for a cost model, `chosen` is the
    more harmful response of a pair. Raises UserError, with file and line for a bad record, also
    when no record is left or every pair is a tie.
    """
    convert = partial(converter(objective, use_margin=True), max_length=max_length, overlong="drop")
    distinct = [*dict.fromkeys(encoders)]
    converts = [partial(convert, encoder=encoder) for encoder in distinct]
    data = load_shared_records(sources, options, Preference, converts, max_records)
    if all(is_tie for row in data.rows[0] for is_tie, *_ in row.pair_facts):
        raise UserError(f"{' '.join(sources)}: every pair is a tie, so accuracy is undefined")
    return EvaluationPairs(data.origins, data.records, dict(zip(distinct, data.rows, strict=True)))


def collect_pairs(
    data: EvaluationPairs, rows: Sequence[Preference], better: Tensor, worse: Tensor
) -> ScoredPairs:
    """Join all pairs of the rows with their scores, (P,) each, and their lengths, margins and agreement."""
    facts = [
        (row.response_lengths[i], row.response_lengths[j], margin, is_tie, origin.rpartition(":")[0], share)
        for origin, record, row in zip(data.origins, data.records, rows, strict=True)
        for share in [agreement(record)]
        for (i, j), (is_tie, margin, *_) in zip(row.pairs, row.pair_facts, strict=True)
    ]
    return ScoredPairs(
        better.numpy(), worse.numpy(), *(np.array(column) for column in zip(*facts, strict=True))
    )


def write_report(judged: ScoredPairs, reward_std: float | None, history: Path | None, folder: Path) -> None:
    """On rank 0, print metrics and verdicts, and write report.json, plots and TensorBoard to a folder.

    reward_std: divisor of the raw scores; None for an ensemble, which has no raw scores. history:
    metrics.jsonl of the model's training, or None. Raises UserError when accuracy is undefined or a score is
    not finite.
    """
    if rank() != 0:
        return
    from torch.utils.tensorboard import SummaryWriter

    lines, warnings = read_metrics(history) if history else ([], [])
    for warning in warnings:
        log(warning)
    try:
        metrics = reward_metrics(judged, reward_std or 1.0)
    except ValueError as error:
        raise UserError(f"no report in {folder}: {error}") from None
    is_ensemble = reward_std is None
    problems = detect_problems(metrics, lines, is_ensemble)
    log(f"\n{table(metrics)}\n\n{format_verdicts(problems, metrics, lines, is_ensemble)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", metrics | {"verdicts": [problem._asdict() for problem in problems]})
    with SummaryWriter(str(folder / "tensorboard")) as board:
        for name, figure in plots(judged, metrics).items():
            with naming(folder / f"{name}.png"):
                figure.savefig(folder / f"{name}.png", dpi=150)
            board.add_figure(f"eval/{name}", figure)
    log(f"\nreport.json and plots: {folder}")
