"""The table of seconds per step, tokens per second, hours and dollars."""

from collections.abc import Sequence

from common.data.batching import steps_in_epochs
from launch.plan.options import PlanOptions
from launch.plan.step_seconds import Step

# Phases and their names. Links and copies count where no computation hides them.
PHASES = {
    "prefill": "prefill",
    "decode": "decode",
    "scoring": "scoring",
    "updates": "updates",
    "optimiser": "optimiser",
    "communication": "links",
    "copies": "copies",
}


def time_table(options: PlanOptions, steps: dict[str, Step]) -> str:
    """Seconds of each phase, one row per phase and one column per step; hours where records are known."""
    rows = [["seconds per step", *steps]]
    for phase, name in PHASES.items():
        seconds = (step.seconds[phase] for step in steps.values())
        rows.append([name, *(f"{time:.2f}" if time else "-" for time in seconds)])
    rows.append(["total", *(f"{step.seconds.total():.2f}" for step in steps.values())])
    speeds = (step.tokens / step.seconds.total() / options.num_gpus for step in steps.values())
    rows.append(["tokens/s per GPU", *(f"{speed:.0f}" for speed in speeds)])
    if any(counts := step_counts(options).values()):
        hours = [n * step.seconds.total() / 3600 for n, step in zip(counts, steps.values(), strict=True)]
        rows.append(["steps", *(str(count or "-") for count in counts)])
        rows.append(["hours", *(f"{time:.1f}" if time else "-" for time in hours)])
        if price := options.price_per_gpu_hour * options.num_gpus:
            rows.append(["dollars", *(f"{time * price:.0f}" if time else "-" for time in hours)])
    return as_text(rows)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a name and cells, as aligned columns."""
    return "\n".join(f"{name:<16}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in rows)


def step_counts(options: PlanOptions) -> dict[str, int]:
    """Steps of a run, as the stages count them; 0: unknown."""
    sizes = {
        "step 1": (options.num_demonstrations, options.global_batch_size),
        "step 2": (options.num_preferences, options.global_batch_size),
        "step 3": (options.num_prompts, max(options.rollout_batch_size // options.samples_per_prompt, 1)),
    }
    return {
        step: steps_in_epochs(records, size, options.num_train_epochs)
        for step, (records, size) in sizes.items()
    }


def machine(options: PlanOptions) -> str:
    """The head line: GPUs, nodes, and where the speeds are from."""
    nodes = -(-options.num_gpus // options.gpus_per_node)
    network = f" on {nodes} machines with {options.link}" if nodes > 1 else ""
    source = f"with speeds of {options.measured_speeds}" if options.measured_speeds else "from data sheets"
    return f"Time on {options.num_gpus} x {options.gpu}{network}, estimated {source}:"
