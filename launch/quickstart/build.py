"""Build the task of the quickstart: a tokenizer, an untrained Llama, and the data of all steps."""

import argparse
import io
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

# As a script, this file's folder is on the path, but the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.text.sentencepiece import load_sentencepiece_tokenizer
from launch.quickstart.world import all_questions, demonstrate, gold_score, spoil

HELD_OUT_PROMPTS = 64
DEMONSTRATIONS = 6000
PREFERENCES = 5000
HELD_OUT_PREFERENCES = 500
SPOILED_SHARE = 0.15
RATER_NOISE = 0.09
SMALLEST_GAP = 0.2
VOCAB_SIZE = 832
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}<|assistant|>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def user(text: str) -> list[dict[str, str]]:
    """One user turn."""
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    """One assistant turn."""
    return [{"role": "assistant", "content": text}]


def demonstrations(rng: random.Random, questions: list[tuple[str, str, str]], count: int) -> Iterable[dict]:
    """Answers of mixed quality; every question is asked equally often."""
    for index in range(count):
        text, good, aspect = questions[index % len(questions)]
        yield {"messages": user(text) + assistant(" ".join(demonstrate(rng, good, aspect)))}


def preferences(rng: random.Random, questions: list[tuple[str, str, str]], count: int) -> Iterable[dict]:
    """Pairs ranked by the gold rule with label noise; pairs with a small gap are left out."""
    while count:
        text, good, aspect = rng.choice(questions)
        pair = [demonstrate(rng, good, aspect) for _ in range(2)]
        answers = [" ".join(spoil(rng, a) if rng.random() < SPOILED_SHARE else a) for a in pair]
        gap = gold_score(text, answers[0]) - gold_score(text, answers[1])
        if abs(gap) < SMALLEST_GAP:
            continue
        first_wins = (gap > 0) != (rng.random() < RATER_NOISE)
        chosen, rejected = answers if first_wins else reversed(answers)
        yield {"prompt": user(text), "chosen": assistant(chosen), "rejected": assistant(rejected)}
        count -= 1


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_data(output_dir: Path, seed: int) -> list[str]:
    """Write the five data files; returns the texts for training the tokenizer."""
    rng = random.Random(seed)
    questions = all_questions()
    rng.shuffle(questions)
    held_out, training = questions[:HELD_OUT_PROMPTS], questions[HELD_OUT_PROMPTS:]
    shown = list(demonstrations(rng, training, DEMONSTRATIONS))
    write_jsonl(output_dir / "demonstrations.jsonl", shown)
    write_jsonl(output_dir / "preferences.jsonl", preferences(rng, training, PREFERENCES))
    write_jsonl(output_dir / "preferences_heldout.jsonl", preferences(rng, held_out, HELD_OUT_PREFERENCES))
    write_jsonl(output_dir / "prompts.jsonl", ({"prompt": user(text)} for text, *_ in training))
    write_jsonl(output_dir / "prompts_heldout.jsonl", ({"prompt": user(text)} for text, *_ in held_out))
    return [message["content"] for record in shown for message in record["messages"]]


def build_tokenizer(model_dir: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """Train SentencePiece on the texts. The chat template uses one token per turn."""
    # With a file, SentencePiece would store its name: bytes would depend on the folder.
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>", "<|assistant|>"],
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        num_threads=1,
        minloglevel=2,
    )
    (model_dir / "tokenizer.model").write_bytes(written.getvalue())
    tokenizer = load_sentencepiece_tokenizer(model_dir / "tokenizer.model")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model_dir)
    return tokenizer


def build_model(model_dir: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, small enough to learn the task in about a minute."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        **special,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, **special)
    model.save_pretrained(model_dir)
    return model


def main() -> None:
    """Parse the options and write all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write the world to")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes")
    options = parser.parse_args()
    disable_progress_bar()
    model_dir = options.output_dir / "model"
    model_dir.mkdir(parents=True, exist_ok=True)
    texts = write_data(options.output_dir, options.seed)
    tokenizer = build_tokenizer(model_dir, texts)
    model = build_model(model_dir, tokenizer, options.seed)
    print(
        f"world in {options.output_dir}: vocabulary {len(tokenizer)}, {model.num_parameters():,} parameters"
    )


if __name__ == "__main__":
    main()
