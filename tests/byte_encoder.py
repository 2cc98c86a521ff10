"""An encoder whose tokens are bytes, with an end token that is not marked as special."""

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from common.text.tokenizer import SegmentEncoder


def byte_encoder(chat_template: str) -> SegmentEncoder:
    """EOS is `</s>`, pad `<pad>`. `<|end|>` is a token too, which decoding does not leave out."""
    vocabulary = ["<pad>", "</s>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.chat_template = chat_template
    return SegmentEncoder(tokenizer)
