"""Options for prompts and sampling."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.runtime.options import DataOptions, Overlong, option


@dataclass
class PromptDataOptions(DataOptions):
    """Held-out prompts and long prompts."""

    overlong: Overlong = option(
        "truncate_prompt",
        "Prompts longer than --max_prompt_length. truncate_prompt: cut the oldest messages, then the"
        " beginning; drop, truncate_response: skip the prompt; error: stop.",
    )


@dataclass
class RoundOptions:
    """The prompts of a round of sampling."""

    prompts_per_round: int = option(
        0, "Prompts per round; each round takes the next ones in random order. 0: all.", at_least=0
    )
    round: int = option(1, "Number of the round. Each round samples different responses.", at_least=1)


@dataclass
class GuidanceOptions:
    """Decoding with the heads of ILQL."""

    ilql_beta: float = option(
        -1.0,
        "For folders of step2_ilql.sh, weight of Q in decoding: log-policy + beta (min Q - V). 0: the policy"
        " alone; -1: the weight saved in the folder.",
        at_least=-1,
    )


@dataclass
class GenerationOptions:
    """Sampling."""

    # Whether log-probabilities under the sampling distribution are computed again, over the same tokens.
    needs_support: ClassVar[bool] = False

    generation_batch_size: int = option(
        64, "Rows that a rank generates or scores in one batch.", at_least=1, resume="free"
    )
    max_prompt_length: int = option(256, "Maximum prompt length in tokens; see --overlong.", at_least=1)
    max_response_length: int = option(128, "Maximum response length in tokens.", at_least=1)
    temperature: float = option(1.0, "Temperature for sampling and for all log-probabilities.", above=0)
    top_k: int = option(0, "Sample from the k most likely tokens; 0: from all.", at_least=0)
    top_p: float = option(
        1.0,
        "Sample from the most likely tokens with this total probability (nucleus sampling).",
        above=0,
        at_most=1,
    )
    gather_for_generation: bool = option(
        True,
        "At ZeRO-3, gather all weights for sampling; turn off if they do not fit on one GPU.",
        resume="free",
    )
    compile_generation: Literal["auto", "yes", "no"] = option(
        "auto",
        "Compile the decoding steps with torch.compile, once in a run; not with vllm, nor with ZeRO-3 weights"
        " that are not gathered.\nauto: on a GPU\nyes: on the CPU too\nno: never\n",
        resume="free",
    )
    rollout_engine: Literal["transformers", "vllm"] = option(
        "transformers",
        "Engine that samples.\ntransformers: the decoding loop of this suite"
        "\nvllm: vLLM, in the same processes; to install it see step3_ppo/README.md\n",
    )
    rollout_tensor_parallel: int = option(
        1, "With vllm, ranks of a machine that share one copy of the weights for sampling.", at_least=1
    )
