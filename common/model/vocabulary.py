"""Fit a model to its tokenizer: vocabulary size, pad id and the ids that end a response."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

MULTIPLE = 64  # of rows: in 16 bits, matrix products are slow with an output head of odd size


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Grow the vocabulary to the tokenizer's, and set the ids for padding and for the end of a response.

    A vocabulary that grows gets a multiple of MULTIPLE rows. Those without a token are never sampled.
    Sets `model.num_tokens`, above all ids of the tokenizer, and `model.end_ids`, the ids that end a response;
    generation_config.json gets the same ids. A multimodal model is frozen except for its text decoder.
    """
    text = model.config.get_text_config()
    model.num_tokens = max(tokenizer.get_vocab().values()) + 1
    if model.num_tokens > text.vocab_size:
        with torch.random.fork_rng(devices=[]):  # each step seeds the GPUs anew
            torch.manual_seed(0)  # same new rows on all ranks, in actor and reference
            model.resize_token_embeddings(model.num_tokens, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    for config in (model.config, text):
        config.pad_token_id = tokenizer.pad_token_id
        if getattr(config, "eos_token_id", None) is None:
            config.eos_token_id = tokenizer.eos_token_id
    if generation := getattr(model, "generation_config", None):
        model.end_ids = _end_ids(generation.eos_token_id or text.eos_token_id, tokenizer, model.num_tokens)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = model.end_ids if len(model.end_ids) > 1 else tokenizer.eos_token_id
    if text is not model.config:
        model.base_model.requires_grad_(False)  # vision parts get no gradients from text
        model.get_decoder().requires_grad_(True)
    return model


def spare_ids(model: PreTrainedModel) -> list[int]:
    """Embedding rows without a token, as in models whose vocabulary is padded to a round number."""
    return [*range(model.num_tokens, model.config.get_text_config().vocab_size)]


def _end_ids(
    configured: int | list[int] | None, tokenizer: PreTrainedTokenizerFast, num_tokens: int
) -> list[int]:
    """EOS, which ends every training response, and the end ids of the model's configuration."""
    ids = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    return [i for i in dict.fromkeys(ids) if isinstance(i, int) and 0 <= i < num_tokens]
