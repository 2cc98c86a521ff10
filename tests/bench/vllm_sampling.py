"""Processor seconds of sampling on the CPU: vLLM against the decoding loop, on random Llamas.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python tests/bench/vllm_sampling.py [--hidden_size 256]

Rounds alternate; the least of each counts. No response ends early.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.generation.decoding import sample_responses, uniforms_for
from common.generation.generate import PlainEngine
from common.generation.options import GenerationOptions
from common.generation.vllm_sampler import VllmSampler
from common.runtime.distributed import init_distributed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    init_distributed()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        intermediate_size=options.hidden_size * 8 // 3, num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 128, max_position_embeddings=1024, initializer_range=0.05,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.num_tokens, model.end_ids = options.vocabulary, []
    prompts = torch.randint(3, options.vocabulary, (options.rows, options.prompt_tokens)).tolist()
    sampling = GenerationOptions(
        generation_batch_size=options.rows, max_prompt_length=options.prompt_tokens,
        max_response_length=options.new_tokens, rollout_engine="vllm",
    )  # fmt: skip
    sampling.seed = 0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        longest = options.prompt_tokens + options.new_tokens
        sampler = VllmSampler(PlainEngine(model), folder, sampling, longest)
    uniforms = uniforms_for(0, 1, range(options.rows), options.new_tokens)
    ways = {
        "loop": lambda: sample_responses(model, prompts, uniforms, 1.0, 1.0, options.vocabulary, 0, False),
        "vllm": lambda: sampler.sample(prompts, range(options.rows), sampling, 1, 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, run in ways.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    least = {name: min(times) for name, times in seconds.items()}
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{size:.1f}M parameters: {least}; loop / vllm = {least['loop'] / least['vllm']:.2f}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
