"""Options of the annotation page and of sampled pairs."""

from dataclasses import dataclass
from typing import ClassVar

from common.generation.options import GenerationOptions, RoundOptions
from common.runtime.options import CacheOptions, InferenceOptions, option


@dataclass
class AnnotateOptions:
    """Human preferences between two responses."""

    pair_data: list[str] = option(
        [],
        "Pairs: prompt + response_a + response_b. Records that also have `preference` are golden questions.",
        required=True,
    )
    golden_data: list[str] = option(
        [],
        "More golden questions, in any preference format of step 2: asked among the pairs, not in --output.",
        resume="free",
    )
    output: str = option(
        "", "JSONL file for step 2. F.jsonl keeps its click log in F.clicks.jsonl.", required=True
    )
    agreement: bool = option(False, "Print rater agreement and biases, and exit.")
    until_answered: bool = option(
        False,
        "End as soon as every pair has an answer, or a skip, of one rater; at once if it has.",
    )
    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0: also for other machines, unencrypted.")
    port: int = option(8700, "Port of the page; 0: any free port.", at_least=0, at_most=65535)
    seed: int = option(0, "Seed of the order of pairs and of the sides of responses.", at_least=0)
    skip_bad_records: bool = option(False, "Count and skip malformed records instead of stopping.")


@dataclass
class SamplePairsOptions(CacheOptions, RoundOptions, GenerationOptions, InferenceOptions):
    """Pairs of responses to the same prompt, from one or two policies."""

    resume_from_checkpoint: ClassVar[str] = "latest"  # the same command always resumes

    model_name_or_path: list[str] = option(
        [], "Folders or hub names of one or two policies.", required=True, resume="model"
    )
    prompt_data: list[str] = option(
        [], "Records with prompts; F.jsonl:0.1 takes 10 %.", required=True, resume="data"
    )
    eval_fraction: float = option(
        0.0,
        "Leave out the prompts that training with this --eval_fraction holds out; 0: use all.",
        at_least=0,
        at_most=0.9,
    )
    output_dir: str = option("output/sample_pairs", "Folder for pairs.jsonl.", resume="free")
    responses_per_prompt: int = option(
        2, "Responses per prompt, from two policies in turn; every two form a pair.", at_least=2, at_most=1000
    )
    max_prompt_length: int = option(
        256, "Maximum prompt length in tokens; longer prompts are dropped.", at_least=1
    )
    seed: int = option(0, "Seed of sampling.", at_least=0)
