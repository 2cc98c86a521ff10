"""Shared options. Every option is declared once, with its type, default, help text and limits.

The options of a command are one dataclass, which inherits option groups; `parse_options` checks them.
"""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


class UserError(ValueError):
    """An error that the user can fix; shown as one line without a traceback."""

    def __init__(self, message: str) -> None:
        # Names and values of the user may hold line ends, and bytes that no terminal shows.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def reason(error: BaseException) -> str:
    """Reason of a library's error in one line: the first line of its message, or the type of the error.

    A first line that ends in a colon is joined with the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [" ".join(lines[:2])]
    if lines and lines[0].startswith("Exceeds the limit ("):  # its own advice is a call of Python
        return "a number has thousands of digits"
    is_bare = not lines or isinstance(error, KeyError)  # its message is only the key
    return ": ".join([type(error).__name__] * is_bare + lines[:1])


# Whether an option may change when a run is resumed. same: no. free: yes. data, model: the path may change,
# the content of the files may not. function: the content of the file may change, to fix bugs, the value may
# not. centring: the data may change, because they are only used to centre scores.
Resume = Literal["same", "free", "data", "model", "function", "centring"]


def option(
    default: Any, help: str, required: bool = False, resume: Resume = "same", formerly: str = "",
    switch: tuple[str, str] | None = None, **limits: float,
) -> Any:  # fmt: skip
    """A dataclass field with its help text and, optionally, the limits `at_least`, `above` or `at_most`.

    formerly: an older name, which is still accepted; several options may share one. switch: the choices that
    stand for false and true, which an option with choices still accepts if it was a switch.
    """
    metadata = {"help": help, "required": required, "resume": resume, "formerly": formerly, "switch": switch}
    metadata["limits"] = limits
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


MICRO_BATCH_TOKENS = (
    "Tokens per micro-batch, with padding, in place of --micro_batch_size; a longer record is alone. 0: none."
)
Attention = Literal[
    "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention", "varlen"
]
ATTENTION = "Attention kernels. auto: as the model's class prefers; varlen: torch's own, without padding."
Overlong = Literal["truncate_prompt", "truncate_response", "drop", "error"]
BEST_METRIC = "Save the model with the best value of this metric in best/, and keep its checkpoint."


@dataclass
class RankOptions:
    """Ranks."""

    timeout_minutes: float = option(
        30.0,
        "Timeout of collectives: how long a rank waits for the slowest one.",
        above=0,
        at_most=525_600,
        resume="free",
    )


@dataclass
class RunOptions(RankOptions):
    """Run length, outputs and intervals."""

    output_dir: str = option("output/run", "Folder for logs, checkpoints and the final model.", resume="free")
    seed: int = option(0, "Seed of data order, new weights and sampling.", at_least=0)
    deterministic: bool = option(
        False, "Reproduce a run to the byte on the same kind and number of GPUs; slower.", resume="free"
    )
    max_steps: int = option(
        0, "Number of training steps; 0: computed from --num_train_epochs.", at_least=0, resume="free"
    )
    num_train_epochs: float = option(
        1.0, "Epochs over the training data if --max_steps is 0.", above=0, at_most=1e6, resume="free"
    )
    logging_steps: int = option(
        10, "Steps between progress lines and entries of metrics.jsonl.", at_least=1, resume="free"
    )
    eval_steps: int = option(
        100,
        "Steps between evaluations; 0: evaluate only before the first step and at the end.",
        at_least=0,
        resume="free",
    )
    save_steps: int = option(
        500, "Steps between checkpoints, also saved at the end; 0: no checkpoints.", at_least=0, resume="free"
    )
    save_total_limit: int = option(
        2, "Number of newest checkpoints to keep; 0: all.", at_least=0, resume="free"
    )
    resume_from_checkpoint: str = option(
        "latest",
        "Checkpoint to resume from.\nlatest: the newest one in --output_dir, if any"
        "\nnone: start a new run in an empty folder\nPATH: folder of a checkpoint\n",
        resume="free",
    )
    resume_weights_only: bool = option(
        False, "Resume weights and step from the checkpoint, but reset the optimiser.", resume="free"
    )
    export_only: bool = option(
        False, "Write final/ from the newest checkpoint without further training.", resume="free"
    )
    # Each stage declares the metrics it has.
    best_metric: str = option("none", BEST_METRIC)
    max_skipped_steps: int = option(
        20, "Stop after this many steps in a row skipped for non-finite gradients.", at_least=1, resume="free"
    )


@dataclass
class CacheOptions:
    """Tokenisation and bad records."""

    skip_bad_records: bool = option(
        False, "Skip and count malformed records instead of stopping at the first one."
    )
    cache_dir: str = option("", "Folder of the token cache. Default: ~/.cache/triptych.", resume="free")
    preprocessing_workers: int = option(
        0, "Number of tokenising processes; 0: one per core.", at_least=0, at_most=1024, resume="free"
    )


@dataclass
class InferenceOptions:
    """Precision and partitioning of models that are not trained."""

    zero_config: str = option(
        "",
        "DeepSpeed JSON for precision; at stage 3 it partitions the model. Default: as in training.",
        resume="free",
    )
    attn_implementation: Attention = option("auto", ATTENTION, resume="free")


@dataclass
class DataOptions(CacheOptions):
    """Held-out data and long records."""

    stage: ClassVar[int] = 1
    eval_data: list[str] = option(
        [],
        "Held-out data: files, FOLDER:SPLIT or HUB_NAME:SPLIT. Default: split off the training data.",
        resume="data",
    )
    eval_fraction: float = option(
        0.1,
        "Fraction of the training data to hold out, by hash of the prompt, if --eval_data is not given.",
        at_least=0,
        at_most=0.9,
    )
    data_split: str = option(
        "", "Proportions of the data for steps 1, 2 and 3, such as 2,4,4; split by hash of the prompt."
    )
    max_eval_samples: int = option(
        256, "Maximum number of held-out records; 0: all.", at_least=0, resume="free"
    )
    overlong: Overlong = option(
        "truncate_prompt",
        "Records longer than --max_length; those whose response still does not fit are left out."
        "\ntruncate_prompt: remove the oldest messages, then the start of the prompt"
        "\ntruncate_response: cut the end of the response\ndrop: leave the record out"
        "\nerror: stop with an error\n",
    )


@dataclass
class OptimiserOptions:
    """Batches and AdamW. global_batch_size = micro_batch_size x accumulation steps x ranks."""

    zero_config: str = option(
        "", "DeepSpeed JSON of the trained models. Default: the shipped zero0 (CPU) or zero2.", resume="free"
    )
    attn_implementation: Attention = option("auto", ATTENTION, resume="free")
    global_batch_size: int = option(
        32, "Sequences in one optimiser step, over all ranks.", at_least=1, at_most=10**6
    )
    micro_batch_size: int = option(
        4,
        "Sequences per rank in one forward pass, at most: the largest number that divides a rank's part of a"
        " global batch.",
        at_least=1,
        resume="free",
    )
    micro_batch_tokens: int = option(0, MICRO_BATCH_TOKENS, at_least=0, resume="free")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "cosine", "Learning rate schedule."
    )
    warmup_ratio: float = option(0.03, "Fraction of the steps used for linear warmup.", at_least=0, at_most=1)
    weight_decay: float = option(0.0, "AdamW weight decay, applied to matrices only.", at_least=0)
    adam_beta1: float = option(0.9, "AdamW beta 1.", at_least=0, at_most=0.9999)
    adam_beta2: float = option(0.95, "AdamW beta 2.", at_least=0, at_most=0.99999)
    adam_epsilon: float = option(1e-8, "AdamW epsilon.", above=0)
    paged_adamw: bool = option(False, "Let CUDA move AdamW's moments to host memory when a GPU is full.")
    max_grad_norm: float = option(1.0, "Maximum gradient norm of each model; 0: no clipping.", at_least=0)
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", resume="free"
    )


@dataclass
class LoraOptions:
    """LoRA adapters."""

    lora_rank: int = option(0, "Rank of the LoRA adapters; 0: train all weights.", at_least=0)
    lora_alpha: float = option(32.0, "LoRA alpha: updates are scaled by alpha / rank.", above=0)
    lora_target_modules: list[str] = option(
        ["all-linear"],
        "Modules to adapt, by name or suffix; all-linear: all linear layers except the output head.",
    )
    load_in_4bit: bool = option(False, "Frozen linear layers in 4 bits, NF4 (QLoRA); needs --lora_rank.")
    double_quantisation: bool = option(True, "The scales of 4-bit weights in 8 bits, not in fp32.")


@dataclass
class TrainOptions(RunOptions, DataOptions, OptimiserOptions, LoraOptions):
    """Model and training data."""

    model_name_or_path: str = option("", "Initial model: folder or hub name.", required=True, resume="model")
    train_data: list[str] = option(
        [],
        "Training data: files, FOLDER or HUB_NAME:SPLIT. F.jsonl:0.3 uses 30 % of F.jsonl.",
        required=True,
        resume="data",
    )
    max_length: int = option(1024, "Maximum tokens of prompt and response together.", at_least=8)
    learning_rate: float = option(1e-5, "Peak learning rate.", above=0)


def world_size() -> int:
    """Number of ranks, set by the launcher; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
