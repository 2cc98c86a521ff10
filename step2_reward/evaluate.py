"""What a reward model says of held-out pairs, and the average that its scores are centred on.

A part of step 2, and a command that judges a reward model, or several as one, on preferences:

    bash launch/evaluate_reward.sh --reward_model_name_or_path OUT2/final --eval_data F.jsonl --output_dir DIR
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.alike import load_alike
from common.damaged import read_metrics
from common.data import deal, pad_rows
from common.distributed import (
    device,
    init_distributed,
    log,
    rank,
    sum_over_ranks,
    sum_tensor_over_ranks,
)
from common.ensemble import combine, load_encoders, load_members
from common.files import make_folder, write_json
from common.models import base_model, last_positions, load_config, longest_input, token_scores
from common.options import CacheOptions, UserError, parse_options, world_size
from common.process import (
    UNWRITTEN,
    accept,
    run_main,
    stop_anywhere,
    stop_between_steps,
    stop_requested,
)
from common.progress import track
from common.records import Record
from common.shapes import agreement
from common.tokenization import SegmentEncoder
from common.zero import load_zero_config
from step2_reward.data import Layout, Preference, collate, preference
from step2_reward.loss import pairwise_loss
from step2_reward.options import EvaluateOptions, RewardOptions
from step2_reward.plots import plots
from step2_reward.report import Judged, measure
from step2_reward.report_text import table
from step2_reward.shared_prompt import pair_scores
from step2_reward.verdicts import in_words, verdicts


class Pairs(NamedTuple):
    """Records to judge models on, whole, as each encoder reads them."""

    origins: list[str]  # as `file:line`
    records: list[Record]
    rows: dict[SegmentEncoder, list[Preference]]


def main() -> None:
    # 1. Everything that can be wrong is found before a model is loaded.
    options = parse_options(EvaluateOptions, required=["reward_model_name_or_path", "eval_data"])
    as_trained = RewardOptions(global_batch_size=world_size(), micro_batch_size=1)
    zero = load_zero_config(options.zero_config, as_trained, as_trained.learning_rate)
    encoders = load_encoders(options)
    for path in options.reward_model_name_or_path:
        options.max_length = longest_input(load_config(path), options.max_length, "max_length")
    data = load_pairs(options.eval_data, encoders, options, options.max_length, options.max_eval_samples)
    output = make_folder("output_dir", options.output_dir)
    init_distributed()
    accept()
    stop_anywhere(UNWRITTEN)

    # 2. One model after the other.
    sides = []
    for member in load_members(options, encoders, zero):
        rows, layout = data.rows[member.encoder], Layout(member.encoder.tokenizer.pad_token_id)
        with member.ready() as model:
            sides.append(torch.stack(scored_pairs(model, rows, options.micro_batch_size, layout)))  # (2, P)
            reward_std = getattr(base_model(model).config, "reward_std", 1.0)
    members = torch.stack(sides)  # (M, 2, P)
    better, worse = (combine(members[:, side], options) for side in (0, 1))  # (P,) each

    # 3. What was found. Probabilities are of raw scores, which an ensemble has not.
    history = Path(options.reward_model_name_or_path[0]).parent / "metrics.jsonl"
    alone = len(members) == 1
    judged = judge(data, rows, better, worse)
    stop_between_steps()
    write_report(judged, reward_std if alone else None, history if alone else None, output)


def load_pairs(
    sources: Sequence[str], encoders: Sequence[SegmentEncoder], options: CacheOptions, max_length: int,
    at_most: int = 0,
) -> Pairs:  # fmt: skip
    """Preferences of at most `max_length` tokens to every encoder, so that all models are judged on the same.

    at_most: take the first so many; 0: all. Raises UserError naming file and line of a bad record, when no
    record is left, and when every pair is a tie.
    """
    convert = partial(preference, max_length=max_length, overlong="drop", use_margin=True)
    different = [*dict.fromkeys(encoders)]
    converts = [partial(convert, encoder=encoder) for encoder in different]
    found = load_alike(sources, options, Preference, converts, at_most)
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


@torch.no_grad()
def scored_pairs(
    model: nn.Module, rows: Sequence[Preference], micro_batch: int, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Scores of the better and the worse response of every pair, row after row: (P,) each, fp64 on the CPU.

    model: an engine, or a plain model on this rank's device. Each rank scores its part, and gets all.
    """
    model.eval()
    starts = list(accumulate((len(row.pairs) for row in rows), initial=0))
    scores = torch.zeros(starts[-1], 2, dtype=torch.float64)
    lengths = [max(layout.row_lengths(row)) for row in rows]
    batches = deal(range(len(rows)), lengths, micro_batch, rank(), world_size())
    for picked in track("scoring records", batches, len(rows)):
        # A rank without rows in the last round still takes part in it: at ZeRO-3 a forward needs every rank.
        found = pair_scores(model, collate([rows[i] for i in picked or [0]], layout))
        if picked:
            places = [place for i in picked for place in range(starts[i], starts[i + 1])]
            scores[places] = torch.stack(found, dim=1).double().cpu()  # (p, 2)
    better, worse = sum_tensor_over_ranks(scores.to(device())).cpu().unbind(1)
    return better, worse


def evaluate(engine: Any, rows: Sequence[Preference], micro_batch: int, layout: Layout) -> dict[str, float]:
    """Loss, accuracy, mean margin, and mean and std of the scores of either side.

    The loss is a mean over records, as in training; the others are over pairs. Accuracy is over the pairs of
    which one is better; equal scores are half right there.
    """
    better, worse = scored_pairs(engine, rows, micro_batch, layout)
    engine.train()
    facts = torch.tensor([fact for row in rows for fact in row.pair_facts], dtype=torch.float64)  # (P, 4)
    is_tie, margins, weights, targets = facts[:, 0].bool(), *facts[:, 1:].unbind(1)
    losses = pairwise_loss(better, worse, margins, targets)
    right = (better > worse).double() + 0.5 * (better == worse)
    found = {
        "eval/loss": (losses * weights).sum() / len(rows),
        "eval/accuracy": right[~is_tie].sum() / max(1, (~is_tie).sum()),
        "eval/margin": (better - worse).mean(),
        "eval/chosen_mean": better.mean(),
        "eval/chosen_std": better.std(correction=0),
        "eval/rejected_mean": worse.mean(),
        "eval/rejected_std": worse.std(correction=0),
    }
    return {name: float(figure) for name, figure in found.items()}


@torch.no_grad()
def score_statistics(
    engine: Any, rows: Sequence[list[int]], micro_batch: int, pad_token_id: int, output_dir: str
) -> tuple[float, float] | None:
    """Mean and standard deviation of the raw scores of token rows that end in EOS.

    None when the run in `output_dir` was asked to stop before the last micro-batch.
    """
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    batches = deal(range(len(rows)), [len(row) for row in rows], micro_batch, rank(), world_size())
    for picked in track("scoring demonstrations", batches, len(rows)):
        if stop_requested(output_dir):
            engine.train()
            return None
        ids = [rows[i] for i in picked] or [rows[0]]
        input_ids = pad_rows(ids, pad_token_id).to(device())
        lengths = torch.tensor([len(row) for row in ids], device=device())
        scores = token_scores(engine, input_ids, last_positions(lengths, input_ids.shape[1])).double().cpu()
        if picked:
            sums += torch.stack([torch.ones_like(scores).sum(), scores.sum(), (scores**2).sum()])
    engine.train()
    count, total, squares = sum_over_ranks(*sums)
    return total / count, _std(total, squares, count)


def _std(total: float, squares: float, count: float) -> float:
    return max(squares / count - (total / count) ** 2, 0.0) ** 0.5


if __name__ == "__main__":
    run_main(main)
