"""Judge story models with a rule that no training saw: VADER sentiment of continuations of held-out prompts.

    python tests/bench/judge_stories.py --prompts F.jsonl --reference SFT/final POLICY/final ...

For each policy: mean sentiment and its standard error, KL to the reference (k1, summed over the response),
distinct-2 (different word pairs / word pairs) over all continuations together and within one, and the mean
length.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.data.batching import pad_rows
from common.data.loading import load_examples
from common.generation.decoding import sample_responses, uniforms_for
from common.model.forward import response_logits
from common.numeric.tensor_ops import label_logprobs
from common.runtime.options import DataOptions
from common.text.prompts import Prompt, tokenize_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer

LENGTH = 48
SEED = 1234


def held_out_prompts(path: str, encoder: SegmentEncoder) -> list[list[int]]:
    """Token ids of the prompts that step 3 holds out of the same file by default."""

    convert = partial(tokenize_prompt, encoder=encoder, max_length=256, overlong="truncate_prompt")
    _, held_out = load_examples([path], DataOptions(max_eval_samples=0), Prompt, convert)
    return [row.ids for row in held_out]


@torch.no_grad()
def total_logprobs(
    model: torch.nn.Module, prompts: list[list[int]], responses: list[list[int]]
) -> torch.Tensor:
    """Log-probability of each whole response, (B,)."""
    input_ids = pad_rows([p + r for p, r in zip(prompts, responses, strict=True)], 0)
    starts, lengths = (torch.tensor([len(row) for row in rows]) for rows in (prompts, responses))
    column = torch.arange(input_ids.shape[1])
    positions = (column >= starts[:, None] - 1) & (column < (starts + lengths)[:, None] - 1)
    logits = response_logits(model, input_ids, positions)
    flat = label_logprobs(logits, input_ids[positions.roll(1, dims=1)])
    return torch.stack([part.sum() for part in flat.split(lengths.tolist())])


def distinct_2(texts: list[str]) -> float:
    pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
    return len(set(pairs)) / max(1, len(pairs))


def judge(path: str, reference: torch.nn.Module, encoder: SegmentEncoder, prompts: list[list[int]]) -> str:
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = encoder.tokenizer
    uniforms = uniforms_for(SEED, 0, range(len(prompts)), LENGTH)
    sampled = sample_responses(
        model, prompts, uniforms, 1.0, 1.0, tokenizer.eos_token_id, tokenizer.pad_token_id, synced_gpus=False
    )
    responses = [row[:n].tolist() for row, n in zip(sampled.ids, sampled.lengths.tolist(), strict=True)]
    texts = [encoder.decode_response(p, r) for p, r in zip(prompts, responses, strict=True)]
    analyser = SentimentIntensityAnalyzer()
    sentiment = torch.tensor([analyser.polarity_scores(text)["compound"] for text in texts])
    kl = (
        (total_logprobs(model, prompts, responses) - total_logprobs(reference, prompts, responses))
        .mean()
        .item()
    )
    within = sum(distinct_2([text]) for text in texts) / len(texts)
    error = sentiment.std().item() / len(texts) ** 0.5
    return (
        f"sentiment {sentiment.mean():.3f} +/- {error:.3f}  kl {kl:6.2f}  distinct-2 {distinct_2(texts):.3f}"
        f" (within {within:.3f})  length {sampled.lengths.float().mean():.1f}  {path}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("policies", nargs="+")
    options = parser.parse_args()
    disable_progress_bar()
    torch.manual_seed(0)
    encoder = SegmentEncoder(load_tokenizer(options.reference))
    prompts = held_out_prompts(options.prompts, encoder)
    reference = AutoModelForCausalLM.from_pretrained(options.reference)
    print(f"{len(prompts)} held-out prompts")
    for path in [options.reference, *options.policies]:
        print(judge(path, reference, encoder, prompts), flush=True)


if __name__ == "__main__":
    main()
