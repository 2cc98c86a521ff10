"""Ways to generate side by side: Triptych's sampling, and those of transformers.

    python tests/bench/generation.py --model_name_or_path DIR --prompt_data F.jsonl [--new_tokens 48]

All write as many tokens to the same prompts; no response ends early. Prints seconds and seconds of the
processor, the least of some rounds, and whether greedy tokens are those of `generate`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.generation.decoding import sample_responses, uniforms_for
from common.text.tokenizer import load_tokenizer


def measure(
    name: str, rounds: int, run: Callable[[bool], list[list[int]]], expected: list[list[int]]
) -> None:
    """run: to greedy tokens, or to drawn ones."""
    try:
        alike = run(True) == expected
        seconds = []
        for _ in range(rounds):
            wall, processor = time.perf_counter(), time.process_time()
            run(False)
            seconds.append((time.perf_counter() - wall, time.process_time() - processor))
        wall, processor = map(min, zip(*seconds, strict=True))
        print(f"{name:<20}{wall:10.2f}{processor:12.2f}   {'yes' if alike else 'NO'}", flush=True)
    except Exception as error:  # noqa: BLE001 - what one device or model cannot do is a result too
        print(f"{name:<20} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--prompt_data", required=True, help="JSONL, prompts that are strings.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(options.model_name_or_path)
    precision = torch.bfloat16 if place == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=precision).to(place).eval()
    lines = Path(options.prompt_data).read_text().splitlines()[: options.rows]
    # In the order of their lengths, as step 3 asks them.
    prompts = sorted((tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines), key=len)
    no_token = len(tokenizer)  # as EOS: no response ends early
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts], device=place)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=place)  # (B, P)
    uniforms = uniforms_for(0, 0, range(len(prompts)), options.new_tokens).to(place)  # (B, R)

    def config(greedy: bool, **more: object) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=options.new_tokens, min_new_tokens=None, do_sample=not greedy, top_k=0,
            eos_token_id=no_token, pad_token_id=tokenizer.pad_token_id, **more,
        )  # fmt: skip

    def plain(greedy: bool, **more: object) -> list[list[int]]:
        found = model.generate(ids, attention_mask=mask, generation_config=config(greedy, **more))
        return found[:, longest:].tolist()

    def ours(greedy: bool) -> list[list[int]]:
        temperature = 1e-6 if greedy else 1.0
        return sample_responses(
            model, prompts, uniforms, temperature, 1.0, no_token, tokenizer.pad_token_id, synced_gpus=False
        ).ids.tolist()

    def continuous(greedy: bool) -> list[list[int]]:
        found = model.generate_batch(inputs=prompts, generation_config=config(greedy))
        return [one.generated_tokens for _, one in sorted(found.items(), key=lambda item: int(item[0][4:]))]

    print(f"{len(prompts)} rows, {options.new_tokens} tokens, {place}, {options.threads} threads")
    print(f"{'':<20}{'seconds':>10}{'processor':>12}   greedy tokens alike")
    expected = plain(True)
    measure("generate", options.rounds, plain, expected)
    measure("Triptych", options.rounds, ours, expected)
    static = {"cache_implementation": "static"}
    measure("static cache", options.rounds, lambda greedy: plain(greedy, **static), expected)
    measure("continuous batching", min(options.rounds, 2), continuous, expected)


if __name__ == "__main__":
    main()
