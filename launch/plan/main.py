"""Predict memory, host memory, disk space and time of the three steps without loading a model; list options
that make a step fit, and those that make it faster.

    bash launch/plan.sh --model_name_or_path DIR_OR_HUB_ID --num_gpus 8

The prediction is an upper bound: rows have the maximum length, and in step 1 consist of response tokens only.
Without --reward_model_name_or_path, the reward model is assumed to have the policy's shape.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from launch.plan.attack import advice
from launch.plan.hardware import GPUS
from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.phases import Phase, peak
from launch.plan.predict import GIB, fitted, predict_phases, predict_storage, setting
from launch.plan.remedies import Predictor, cached, least, ways
from launch.plan.step_seconds import step_seconds
from launch.plan.storage import of_machine, on_disk
from launch.plan.time_table import as_text, machine, time_table

REFUSED = 2  # exit code after a mistake of the user, as in training
# Parts and their names in the table. No option changes "fixed".
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "activations": "activations",
    "logits": "logits",
    "KV cache": "KV cache",
    "token lists": "token lists",
    "buffers": "buffers",
    "fixed": "CUDA and NCCL",
}
ON_CPU = {"fixed": "libraries"}

# Memory of a card in GiB, as A100s report it, and its usable share (an assumption, for fragmentation).
CARDS = {"40 GB": 39.4, "80 GB": 79.2}
USABLE = 0.95
WIDEST = 100  # column of options
SCRIPTS = {
    "step 1": "launch/step1_sft.sh",
    "step 2": "launch/step2_reward.sh",
    "step 3": "launch/step3_ppo.sh",
}


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of libraries
    try:
        options = parse_options(PlanOptions)
        os.environ["WORLD_SIZE"] = str(options.num_gpus)  # as the launcher sets it
        options = fitted(options)
        steps = step_seconds(options) if options.device == "gpu" else {}
        all_phases = predict_phases(options)
        phases = {step: peak(of_step) for step, of_step in all_phases.items()}
        print(f"{setting(options)}\n\n{table(phases, options.device)}")
        print(f"\n{by_phase(all_phases['step 3'])}\n\n{storage_table(options, phases)}")
        if options.device == "gpu":
            predictor = cached(options)
            for card, capacity in CARDS.items():
                room = capacity * USABLE
                print(f"\nOn cards of {card}, {room:.1f} GiB of them usable:")
                print("\n".join(verdicts(options, phases, room, predictor)))
            print(f"\n{machine(options)}\n\n{time_table(options, steps)}\n\nLargest part of each step:")
            print("\n".join(advice(options, steps, GPUS[options.gpu].gib * USABLE, predictor)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def table(phases: dict[str, Phase], device: str = "gpu") -> str:
    """The peak of each step in GiB, one row per part and one column per step."""
    names = PARTS | (ON_CPU if device == "cpu" else {})
    rows = [["GiB per rank", *phases], ["peak phase", *(phase.name for phase in phases.values())]]
    for part, name in names.items():
        rows.append([name, *(f"{phase.parts[part] / GIB:.2f}" for phase in phases.values())])
    rows.append(["total", *(f"{total(phase.parts) / GIB:.2f}" for phase in phases.values())])
    return as_text(rows)


def by_phase(phases: Sequence[Phase]) -> str:
    """The peak of step 3 in each phase of its metrics."""
    peaks = dict.fromkeys(("rollout", "score", "train"), 0.0)
    for phase in phases:
        name = {"rollout": "rollout", "scoring": "score"}.get(phase.name, "train")
        peaks[name] = max(peaks[name], (total(phase.parts) - phase.parts["fixed"]) / GIB)
    words = ", ".join(f"{name} {peak:.2f}" for name, peak in peaks.items())
    return f"step 3 by phase, as in its metrics memory/allocated_gib_...: {words}"


def storage_table(options: PlanOptions, phases: dict[str, Phase]) -> str:
    """Host memory of a machine and disk space in GiB, one column per step."""
    ranks, limit = min(options.num_gpus, options.gpus_per_node), options.save_total_limit
    rows = [["GiB", *phases], ["host per rank"], [f"host of {ranks} rank{'s' * (ranks > 1)}"]]
    rows += [["one checkpoint"], ["disk at most"]]
    for step, needs in predict_storage(options).items():
        host = phases[step].parts["host"]
        sizes = host, of_machine(host, ranks, needs.exporting), needs.checkpoint, on_disk(needs, limit)
        for row, size in zip(rows[1:], sizes, strict=True):
            row.append(f"{size / GIB:.2f}")
    if not limit:
        rows[-1][1:] = ["all are kept"] * len(phases)
    return as_text(rows)


def verdicts(
    options: PlanOptions, phases: dict[str, Phase], room: float, predictor: Predictor
) -> Iterator[str]:
    """For each step: that it fits in `room` GiB, or the options that make it fit."""
    for step, phase in phases.items():
        peak = total(phase.parts) / GIB
        if peak <= room:
            yield f"  {step} fits, with {room - peak:.1f} GiB to spare"
            continue
        verdict = f"  {step} does not fit (missing {peak - room:.1f} GiB)"
        solutions = ways(options, step, room, predictor)
        if not solutions:
            way = least(options, step, predictor)
            solutions = [way] if way.peak <= room else []
        if not solutions:
            yield (
                f"{verdict}, even with all options: the minimum is"
                f" {way.peak:.1f} GiB, with {way.options}; use more GPUs, a smaller model or shorter rows"
            )
            continue
        yield f"{verdict}; add to {SCRIPTS[step]} (fastest first):"
        width = min(max(len(way.options) for way in solutions), WIDEST)
        for way in solutions:
            host = f", and {way.host:.1f} GiB of host memory per rank" if way.host else ""
            notes = f"  ({'; '.join(way.notes)})" if way.notes else ""
            yield f"      {way.options:<{width}}  {way.peak:5.1f} GiB{host}{notes}"


if __name__ == "__main__":
    main()
