"""Options of the chat."""

from dataclasses import dataclass

from common.generation.options import GuidanceOptions
from common.model.options import EnsembleOptions
from common.runtime.options import ATTENTION, Attention, option


@dataclass
class ChatOptions(EnsembleOptions, GuidanceOptions):
    """Chat with one model, or with two side by side; reward models score the answers."""

    model_name_or_path: list[str] = option(
        [], "One model, or two to compare: folders or hub names.", required=True, resume="model"
    )
    save_to: str = option("", "JSONL file to which /save appends preferences, for step 2.")
    max_response_length: int = option(128, "Longest answer in tokens.", at_least=1)
    temperature: float = option(1.0, "Sampling temperature; 0: greedy decoding.", at_least=0)
    top_p: float = option(1.0, "Nucleus sampling: share of probability to sample from.", above=0, at_most=1)
    attn_implementation: Attention = option("auto", ATTENTION)
    seed: int = option(0, "Seed of sampling.", at_least=0)
