"""Ways to generate side by side: Triptych's sampling, its former loop, and those of transformers.

    python tests/bench/generation.py --model_name_or_path DIR --prompt_data F.jsonl [--new_tokens 48]
        [--mean_length 16] [--samples 4]

All write as many tokens to the same prompts. The rounds of the ways alternate. Prints seconds and seconds of
the processor, the least of all rounds, the median of their ratio to the former loop in the same round, and
whether greedy tokens are those of `generate`.

--mean_length: the end token has probability 1 / mean_length, so that lengths are unlike. --samples: responses
per prompt. With `random:HIDDEN,LAYERS,HEADS,VOCABULARY` as model, a Llama with random weights and the
tokenizer of --tokenizer.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.generation.decoding import sample_responses, uniforms_for
from common.text.tokenizer import load_tokenizer
from tests.bench.former_loop import former_responses

Way = Callable[[bool], list[list[int]]]  # to greedy tokens, or to drawn ones


def compare(ways: dict[str, Way], rounds: int, expected: list[list[int]]) -> None:
    """Run the ways in turn, and print a line for each."""
    alike, seconds = {}, {name: [] for name in ways}
    for name, run in ways.items():
        alike[name] = run(True) == expected  # also warms up
    for _ in range(rounds):
        for name, run in ways.items():
            wall, processor = time.perf_counter(), time.process_time()
            run(False)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    for name, pairs in seconds.items():
        wall, processor = map(min, zip(*pairs, strict=True))
        ratios = [former[1] / own[1] for former, own in zip(seconds["former loop"], pairs, strict=True)]
        greedy = "yes" if alike[name] else "NO"
        print(f"{name:<20}{wall:10.2f}{processor:12.2f}{median(ratios):12.2f}   {greedy}", flush=True)


def load(path: str, tokenizer_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, or a random one, and the tokenizer."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    precision = torch.bfloat16 if place == "cuda" else torch.float32
    if not path.startswith("random:"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=precision)
        return model.to(place).eval(), load_tokenizer(tokenizer_path or path)
    hidden, layers, heads, vocabulary = map(int, path.removeprefix("random:").split(","))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=precision)
    return model.to(place).eval(), load_tokenizer(tokenizer_path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--prompt_data", required=True, help="JSONL, prompts that are strings.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--mean_length", type=float, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--continuous", action="store_true", help="also transformers' continuous batching")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model_name_or_path, options.tokenizer)
    place = model.device
    lines = Path(options.prompt_data).read_text().splitlines()[: options.rows // options.samples]
    # In the order of their lengths, as step 3 asks them.
    prompts = sorted((tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines), key=len)
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    end = model.config.vocab_size  # no response ends early
    if options.mean_length:
        end = tokenizer.eos_token_id
        model.lm_head = EndingHead(model.lm_head, end, 1 / options.mean_length)
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts], device=place)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=place)  # (B, P)
    uniforms = uniforms_for(0, 0, range(len(prompts)), options.new_tokens).to(place)  # (B, R)

    def config(greedy: bool, **more: object) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=options.new_tokens, min_new_tokens=None, do_sample=not greedy, top_k=0,
            eos_token_id=end, pad_token_id=tokenizer.pad_token_id, **more,
        )  # fmt: skip

    def plain(greedy: bool, **more: object) -> list[list[int]]:
        torch.manual_seed(0)
        result = model.generate(ids, attention_mask=mask, generation_config=config(greedy, **more))
        return result[:, longest:].tolist()

    def ours(greedy: bool) -> list[list[int]]:
        temperature, padding = 1e-6 if greedy else 1.0, tokenizer.pad_token_id
        return sample_responses(model, prompts, uniforms, temperature, 1.0, end, padding, False).ids.tolist()

    def former(greedy: bool) -> list[list[int]]:
        temperature, padding = 1e-6 if greedy else 1.0, tokenizer.pad_token_id
        return former_responses(model, prompts, uniforms, temperature, end, padding).tolist()

    def continuous(greedy: bool) -> list[list[int]]:
        result = model.generate_batch(inputs=prompts, generation_config=config(greedy))
        return [one.generated_tokens for _, one in sorted(result.items(), key=lambda item: int(item[0][4:]))]

    ways = {
        "former loop": former,
        "Triptych": ours,
        "generate": plain,
        "static cache": lambda greedy: plain(greedy, cache_implementation="static"),
    }
    if options.continuous:
        ways["continuous batching"] = continuous
    print(f"{len(prompts)} rows, {options.new_tokens} tokens, {place}, {options.threads} threads")
    print(f"{'':<20}{'seconds':>10}{'processor':>12}{'speed':>12}   greedy tokens alike")
    compare(ways, options.rounds, plain(True))


class EndingHead(nn.Module):
    """An output head that gives the end token a fixed probability."""

    def __init__(self, head: nn.Module, end: int, probability: float) -> None:
        super().__init__()
        self.head, self.end, self.odds = head, end, math.log(probability / (1 - probability))

    def forward(self, states: Tensor) -> Tensor:
        logits = self.head(states)
        logits[..., self.end] = -math.inf
        logits[..., self.end] = logits.logsumexp(-1) + self.odds
        return logits


if __name__ == "__main__":
    main()
