"""Options of a chat."""

from dataclasses import dataclass

from common.model.options import EnsembleOptions
from common.runtime.options import option


@dataclass
class ChatOptions(EnsembleOptions):
    """A chat with a model, or with two that are compared; reward models score the answers."""

    model_name_or_path: list[str] = option(
        [], "Folder or hub name of the model, or of the two to compare.", required=True, resume="model"
    )
    save_to: str = option("", "JSONL file to which /save adds preferences, for step 2.")
    max_response_length: int = option(128, "Longest answer in tokens.", at_least=1)
    temperature: float = option(1.0, "Temperature of sampling; 0: always the likeliest token.", at_least=0)
    top_p: float = option(
        1.0, "Sample from the likeliest tokens that make up this share.", above=0, at_most=1
    )
    seed: int = option(0, "Seed of sampling.", at_least=0)
