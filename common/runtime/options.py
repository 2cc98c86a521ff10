"""Options that stages share. Every option is declared once, with its type, default, help text and limits.

The options of a command are one dataclass that inherits the groups it needs; `parse_options` checks them.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

Options = TypeVar("Options")


class UserError(ValueError):
    """A mistake that the user can correct; shown as one line, without a traceback."""


def reason(error: BaseException) -> str:
    """Why a library failed, in one line for the user: the first line of the message, with the next where it
    ends in a colon, or the error's type.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [" ".join(lines[:2])]
    is_bare = not lines or isinstance(error, KeyError)  # whose message is the key alone
    return ": ".join([type(error).__name__] * is_bare + lines[:1])


# How an option binds a resumed run. same: it must have the same value. free: it may change. data, model: the
# path may change, the content of the files or the weights may not. function: the file may change, because a
# mistake in it is mended. centring: the data may change, because scores are only centred on them.
Resume = Literal["same", "free", "data", "model", "function", "centring"]


def option(default: Any, help: str, required: bool = False, resume: Resume = "same", **limits: float) -> Any:
    """A dataclass field with its help text and, optionally, the limits `at_least`, `above` or `at_most`."""
    metadata = {"help": help, "required": required, "resume": resume, "limits": limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


Overlong = Literal["truncate_prompt", "truncate_response", "drop", "error"]
BEST_METRIC = "Keep the model with the best value of this in best/, and its checkpoint."


@dataclass
class RunOptions:
    """Length of the run, outputs and their intervals."""

    output_dir: str = option("output/run", "Folder for logs, checkpoints and the final model.", resume="free")
    seed: int = option(0, "Seed of the data order, of new weights and of sampling.", at_least=0)
    max_steps: int = option(
        0, "Stop after this many steps; 0 means as many as the epochs take.", at_least=0, resume="free"
    )
    num_train_epochs: float = option(
        1.0, "Passes over the training data, when --max_steps is 0.", above=0, resume="free"
    )
    logging_steps: int = option(
        10, "Write metrics and a progress line every so many steps.", at_least=1, resume="free"
    )
    eval_steps: int = option(
        100,
        "Evaluate every so many steps; 0: only before the first step and at the end.",
        at_least=0,
        resume="free",
    )
    save_steps: int = option(
        500, "Save a checkpoint every so many steps and at the end; 0: never.", at_least=0, resume="free"
    )
    save_total_limit: int = option(
        2, "Keep this many newest checkpoints; 0 keeps all.", at_least=0, resume="free"
    )
    resume_from_checkpoint: str = option(
        "latest",
        "'latest' goes on from the newest checkpoint in --output_dir if there is one, 'none' starts "
        "anew in an empty folder, or the path of a checkpoint folder.",
        resume="free",
    )
    resume_weights_only: bool = option(
        False, "Take weights and position from the checkpoint, and start the optimiser anew.", resume="free"
    )
    export_only: bool = option(
        False, "Write final/ from the newest checkpoint, and train no more.", resume="free"
    )
    # Each stage declares which figures it measures.
    best_metric: str = option("none", BEST_METRIC)
    max_skipped_steps: int = option(
        20, "Stop after this many steps in a row whose numbers were not finite.", at_least=1, resume="free"
    )
    timeout_minutes: float = option(
        30.0, "How long a rank waits for the slowest one before it gives up.", above=0, resume="free"
    )


@dataclass
class CacheOptions:
    """Tokenisation and bad records."""

    skip_bad_records: bool = option(
        False, "Count and skip malformed records instead of stopping at the first."
    )
    cache_dir: str = option("", "Folder of tokenised data. Default: ~/.cache/triptych.", resume="free")
    preprocessing_workers: int = option(
        0, "Processes that tokenise; 0: one per core.", at_least=0, resume="free"
    )


@dataclass
class DataOptions(CacheOptions):
    """Held-out data and long records."""

    stage: ClassVar[int] = 1
    eval_data: list[str] = option(
        [],
        "Held-out data: files, FOLDER:SPLIT or HUB_NAME:SPLIT. Default: a part of the training data.",
        resume="data",
    )
    eval_fraction: float = option(
        0.1,
        "Part of the training data to hold out, by record content, when --eval_data is not given.",
        at_least=0,
        at_most=0.9,
    )
    data_split: str = option(
        "", "Parts of the data for steps 1, 2 and 3, as in 2,4,4: each takes its own, by prompt."
    )
    max_eval_samples: int = option(
        256, "Use at most this many held-out records; 0 uses all.", at_least=0, resume="free"
    )
    overlong: Overlong = option(
        "truncate_prompt",
        "Records longer than --max_length. truncate_prompt: take the oldest messages, then the prompt's"
        " beginning, away; truncate_response: cut the response; drop: leave them out; error: stop. A record"
        " whose response does not fit is left out.",
    )


@dataclass
class OptimiserOptions:
    """Batches and AdamW. global_batch_size = micro_batch_size x accumulation x ranks, exactly."""

    zero_config: str = option(
        "", "DeepSpeed JSON of the trained models. Default: the shipped zero0 (CPU) or zero2.", resume="free"
    )
    global_batch_size: int = option(32, "Sequences in one optimiser step, over all ranks.", at_least=1)
    micro_batch_size: int = option(
        4, "Sequences that one rank puts through the model at once.", at_least=1, resume="free"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "cosine", "Shape of the learning rate over the run."
    )
    warmup_ratio: float = option(
        0.03, "Part of the steps over which the learning rate rises.", at_least=0, at_most=1
    )
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices only.", at_least=0)
    adam_beta1: float = option(0.9, "AdamW beta 1.", at_least=0, at_most=0.9999)
    adam_beta2: float = option(0.95, "AdamW beta 2.", at_least=0, at_most=0.99999)
    adam_epsilon: float = option(1e-8, "AdamW epsilon.", above=0)
    max_grad_norm: float = option(
        1.0, "Clip the gradient norm of each model to this; 0: do not clip.", at_least=0
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", resume="free"
    )


@dataclass
class LoraOptions:
    """LoRA adapters, through `peft`."""

    lora_rank: int = option(0, "Rank of the adapters; 0 trains all weights.", at_least=0)
    lora_alpha: float = option(
        32.0, "Scale of the adapters: the update is multiplied by alpha / rank.", above=0
    )
    lora_target_modules: list[str] = option(
        ["all-linear"],
        "Names (or endings of names) of the modules to adapt; all-linear: all but the output head.",
    )


@dataclass
class TrainOptions(RunOptions, DataOptions, OptimiserOptions, LoraOptions):
    """Model and training data."""

    model_name_or_path: str = option(
        "", "Folder or hub name of the model to start from.", required=True, resume="model"
    )
    train_data: list[str] = option(
        [], "Data: files (F.jsonl:0.3 takes 30 %), FOLDER, NAME:SPLIT.", required=True, resume="data"
    )
    max_length: int = option(1024, "Longest sequence in tokens, prompt and response together.", at_least=8)
    learning_rate: float = option(1e-5, "Highest learning rate.", above=0)


def accumulation_steps(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Micro-batches per rank in a step. Raises UserError unless global = micro x steps x ranks."""
    steps, rest = divmod(global_batch, micro_batch * ranks)
    if rest or not steps:
        raise UserError(
            f"--global_batch_size {global_batch} is not a multiple of"
            f" --micro_batch_size {micro_batch} x {ranks} rank{'s' * (ranks != 1)}"
        )
    return steps


def world_size() -> int:
    """Number of ranks, as the launcher says; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
