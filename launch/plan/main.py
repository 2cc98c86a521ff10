"""Memory of the three steps on each GPU, before anything is loaded: what fits, and what would make it fit.

    bash launch/plan.sh --model_name_or_path DIR_OR_HUB_ID --num_gpus 8

Rows are taken to be as long as the options allow, and in step 1 to be all response: the most that a run can
need. Without --reward_model_name_or_path, the reward model is taken to have the policy's shape.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common.options import UserError, parse_options
from common.zero import CONFIG_FOLDER
from launch.plan.memory import total
from launch.plan.options import PlanOptions
from launch.plan.phases import Phase
from launch.plan.predict import GIB, predict

REFUSED = 2  # exit code after a mistake of the user, as in training
PARTS = [
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "logits",
    "KV cache",
    "which tokens",
    "buffers",
    "fixed",
]

# Memory of a card in GiB, as A100s report it, and the share of it that is planned with: the allocator leaves
# holes. The share is an assumption.
CARDS = {"40 GB": 39.4, "80 GB": 79.2}
USABLE = 0.95

# What may help, and which options say so.
ONE_JSON = {"actor_zero_config": "", "critic_zero_config": ""}
REMEDIES: dict[str, dict[str, Any]] = {
    "--gradient_checkpointing": {"gradient_checkpointing": True},
    "--micro_batch_size 1": {"micro_batch_size": 1},
    "--generation_batch_size 8": {"generation_batch_size": 8},
    "--offload_frozen": {"offload_frozen": True},
    "zero3.json": {**ONE_JSON, "zero_config": str(CONFIG_FOLDER / "zero3.json")},
    "--lora_rank 16": {"lora_rank": 16},
    "zero3_offload.json": {**ONE_JSON, "zero_config": str(CONFIG_FOLDER / "zero3_offload.json")},
}


def main() -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    try:
        options = parse_options(PlanOptions, required=["model_name_or_path"])
        os.environ["WORLD_SIZE"] = str(options.num_gpus)  # what the launcher would say
        found = predict(options)
        print(table(found))
        if options.device == "gpu":
            for card, capacity in CARDS.items():
                print("\n".join(["", f"On cards of {card}:", *verdicts(options, found, capacity * USABLE)]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def table(found: dict[str, Phase]) -> str:
    """What each step holds at its most, in GiB: a row for each part, a column for each step."""
    rows = [["GiB per rank", *found], ["at its most in", *(phase.name for phase in found.values())]]
    for part in PARTS:
        sizes = [phase.parts[part] / GIB for phase in found.values()]
        rows.append([part, *(f"{size:.2f}" if size else "" for size in sizes)])
    rows.append(["total", *(f"{total(phase.parts) / GIB:.2f}" for phase in found.values())])
    if any(phase.parts["host"] for phase in found.values()):
        rows.append(["on the host", *(f"{phase.parts['host'] / GIB:.2f}" for phase in found.values())])
    return "\n".join(f"{name:<16}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in rows)


def verdicts(options: PlanOptions, found: dict[str, Phase], room: float) -> Iterator[str]:
    """A line for each step: that it fits in `room` GiB, or what would make it fit."""
    for step, phase in found.items():
        need = total(phase.parts) / GIB
        if need <= room:
            yield f"  {step} fits, with {room - need:.1f} GiB to spare"
        else:
            yield f"  {step} does not fit, by {need - room:.1f} GiB; {remedy(options, step, room)}"


def remedy(options: PlanOptions, step: str, room: float) -> str:
    """Every single change that is enough, or those of the first ones that together are."""

    def fits(names: list[str]) -> bool:
        changes = {key: value for name in names for key, value in REMEDIES[name].items()}
        return total(predict(replace(options, **changes))[step].parts) / GIB <= room

    enough = [name for name in REMEDIES if fits([name])]
    if enough:
        return f"it does with {' or '.join(enough)}"
    together: list[str] = []
    for name in REMEDIES:
        together.append(name)
        if fits(together):
            for one in [*together]:
                rest = [other for other in together if other != one]
                together = rest if fits(rest) else together
            return f"it does with {' and '.join(together)}"
    return "nor with all that helps: it needs more GPUs, or a smaller model"


if __name__ == "__main__":
    main()
