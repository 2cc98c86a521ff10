"""Make the benchmark's model, tokenizer and data: random, seeded, and the same for every contender.

Usage: ``fixture.py --config JSON`` with keys ``folder records seed lengths max_length
response_length``. Prints one JSON
line: the paths, and the mean number of real (unpadded) tokens of one record per kind of data.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import mean

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 4096
PROMPT_TOKENS = (16, 32)  # inclusive ranges, drawn uniformly
COMPLETION_TOKENS = (36, 66)
FIELDS = {
    "sft": ["completion"],
    "reward": ["chosen", "rejected"],
    "ppo": [],
    "direct": ["chosen", "rejected"],
}
# Mean and standard deviation of log tokens in preferences of Open-Assistant, as a BPE of 49k sees them.
PROMPT_LOG_TOKENS = (4.01, 1.36)
COMPLETION_LOG_TOKENS = (4.69, 1.04)


def make_tokenizer(rng: random.Random) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Train a byte-level BPE on made-up words; return it with the words that are one token everywhere."""
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(2000)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["\n".join(words), " ".join(["", *words])], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )
    assert len(tokenizer) == VOCAB_SIZE
    short = [word for word in words if len(bpe.encode(word).ids) == len(bpe.encode(" " + word).ids) == 1]
    return tokenizer, short


def make_models(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[Path, Path]:
    """Write a random Llama of 6.8M parameters, and its scalar-head twin, with their tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    policy, reward = folder / "policy", folder / "reward"
    LlamaForCausalLM(config).save_pretrained(policy)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(reward)
    for path in (policy, reward):
        tokenizer.save_pretrained(path)
    return policy, reward


def make_records(
    kind: str, count: int, words: list[str], rng: random.Random, lengths: str, max_length: int, response: int
) -> list[dict[str, str]]:
    """Records of one kind of data; all texts but prompts start with a space, so that strings concatenate.

    lengths: `uniform`, `fixed`, or of `conversations`, none with more than `max_length` tokens. response: new
    tokens after a prompt of PPO.
    """

    def draw(bounds: tuple[int, int], log_tokens: tuple[float, float]) -> int:
        if lengths == "conversations":
            return max(1, round(rng.lognormvariate(*log_tokens)))
        return sum(bounds) // 2 if lengths == "fixed" else rng.randint(*bounds)

    def text(length: int) -> str:
        return "".join(" " + word for word in rng.choices(words, k=length))

    fields = FIELDS[kind]
    records: list[dict[str, str]] = []
    while len(records) < count:
        prompt = draw(PROMPT_TOKENS, PROMPT_LOG_TOKENS)
        rest = [draw(COMPLETION_TOKENS, COMPLETION_LOG_TOKENS) for _ in fields]
        if prompt + max(rest, default=response) < max_length:
            texts = {field: text(length) for field, length in zip(fields, rest, strict=True)}
            records.append({"prompt": text(prompt)[1:]} | texts)
    return records


def tokens_of(record: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens a trainer processes for a record: each continuation with prompt and EOS; a lone prompt as is."""
    continuations = [record[field] + tokenizer.eos_token for field in record if field != "prompt"] or [""]
    return sum(len(tokenizer(record["prompt"] + text)["input_ids"]) for text in continuations)


def main() -> None:
    """Build everything in the folder that the config names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=json.loads, required=True)
    config = parser.parse_args().config
    folder = Path(config["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(config["seed"])
    tokenizer, words = make_tokenizer(rng)
    policy, reward = make_models(folder, tokenizer, config["seed"])
    result = {"policy": str(policy), "reward_model": str(reward), "data": {}, "tokens_per_record": {}}
    sizes = config["lengths"], config["max_length"], config["response_length"]
    for kind in FIELDS:
        records = make_records(kind, config["records"], words, rng, *sizes)
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        result["data"][kind] = str(path)
        result["tokens_per_record"][kind] = mean(tokens_of(record, tokenizer) for record in records)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
