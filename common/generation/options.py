"""Options of prompts and of sampling."""

from dataclasses import dataclass

from common.runtime.options import DataOptions, Overlong, option


@dataclass
class PromptDataOptions(DataOptions):
    """Held-out prompts and long prompts."""

    overlong: Overlong = option(
        "truncate_prompt",
        "Prompts longer than --max_prompt_length. truncate_prompt: take the oldest messages, then the"
        " beginning, away; drop or truncate_response: leave them out; error: stop.",
    )


@dataclass
class GenerationOptions:
    """Sampling."""

    generation_batch_size: int = option(64, "Rows that one rank generates or scores at once.", at_least=1)
    max_prompt_length: int = option(
        256, "Longest prompt in tokens; a longer one loses its beginning.", at_least=1
    )
    max_response_length: int = option(128, "Longest response in tokens.", at_least=1)
    temperature: float = option(1.0, "Temperature of sampling and of every log-probability.", above=0)
    top_k: int = option(0, "Sample from this many likeliest tokens; 0: from all.", at_least=0)
    top_p: float = option(
        1.0, "Sample from the likeliest tokens that make up this share.", above=0, at_most=1
    )
    gather_for_generation: bool = option(
        True, "At ZeRO-3, gather all weights once to sample; turn off when they do not fit on one GPU."
    )
