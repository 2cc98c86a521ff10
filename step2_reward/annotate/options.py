"""Options of pairs for people, and of the page where they choose."""

from dataclasses import dataclass
from typing import ClassVar

from common.generation.options import GenerationOptions
from common.runtime.options import CacheOptions, option


@dataclass
class AnnotateOptions:
    """Preferences of people between two responses."""

    pair_data: list[str] = option(
        [],
        "Pairs: prompt + response_a + response_b; a record that also has its answer, as `preference`, is a"
        " golden question.",
        required=True,
    )
    golden_data: list[str] = option(
        [],
        "More golden questions, in any shape of step 2: asked among the others, never in --output.",
        resume="free",
    )
    output: str = option(
        "", "JSONL file for step 2; every click is in FILE.clicks.jsonl beside it.", required=True
    )
    agreement: bool = option(False, "Print how raters agree, and their biases, and end.")
    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0: also for other machines, unencrypted.")
    port: int = option(8700, "Port of the page; 0: any that is free.", at_least=0, at_most=65535)
    seed: int = option(0, "Seed of the order of pairs, and of which response is on the left.", at_least=0)
    skip_bad_records: bool = option(False, "Leave bad records out instead of stopping at the first.")


@dataclass
class SamplePairsOptions(CacheOptions, GenerationOptions):
    """Responses of one policy or two to the same prompts, in pairs."""

    resume_from_checkpoint: ClassVar[str] = "latest"  # the same command always goes on

    model_name_or_path: list[str] = option(
        [], "Folder or hub name of one policy, or of two.", required=True, resume="model"
    )
    prompt_data: list[str] = option(
        [], "Records with prompts; F.jsonl:0.1 takes a tenth of them.", required=True, resume="data"
    )
    output_dir: str = option("output/sample_pairs", "Folder for pairs.jsonl.", resume="free")
    responses_per_prompt: int = option(
        2, "Responses drawn per prompt, by two policies in turn; every two of them are a pair.", at_least=2
    )
    max_prompt_length: int = option(256, "Longest prompt in tokens; a longer one is left out.", at_least=1)
    seed: int = option(0, "Seed of sampling.", at_least=0)
    zero_config: str = option(
        "",
        "DeepSpeed JSON that says precision, and partitions at stage 3. Default: as in training.",
        resume="free",
    )
