"""What a model has to know of its tokenizer: which ids exist, which pad a text, and which end a response."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def fit_to_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Grow the vocabulary to the tokenizer's, and set the ids that pad and end a text.

    `model.num_tokens`: all ids of the tokenizer are below it. `model.end_ids`: what ends a response. They
    reach generation_config.json too, so that an exported model ends there. Of a multimodal model, only what a
    text goes through is left to be trained.
    """
    text = model.config.get_text_config()
    model.num_tokens = max(tokenizer.get_vocab().values()) + 1
    if model.num_tokens > text.vocab_size:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same new rows on every rank, and in actor and reference
            model.resize_token_embeddings(model.num_tokens, mean_resizing=False)
    for config in (model.config, text):
        config.pad_token_id = tokenizer.pad_token_id
        if getattr(config, "eos_token_id", None) is None:
            config.eos_token_id = tokenizer.eos_token_id
    if generation := getattr(model, "generation_config", None):
        model.end_ids = _end_ids(generation.eos_token_id or text.eos_token_id, tokenizer, model.num_tokens)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.eos_token_id = model.end_ids if len(model.end_ids) > 1 else tokenizer.eos_token_id
    if text is not model.config:
        model.base_model.requires_grad_(False)  # vision and the like, which no gradient would reach
        model.get_decoder().requires_grad_(True)
    return model


def spare_ids(model: PreTrainedModel) -> list[int]:
    """Rows of the embeddings for which the tokenizer has no token, as in models padded to a round number."""
    return [*range(model.num_tokens, model.config.get_text_config().vocab_size)]


def _end_ids(named: int | list[int] | None, tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> list[int]:
    """EOS, which training puts behind a reply, and the ids that the model's configuration names."""
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return [i for i in dict.fromkeys(ids) if isinstance(i, int) and 0 <= i < num_tokens]
