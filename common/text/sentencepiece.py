"""Load a SentencePiece `tokenizer.model` as a fast Hugging Face tokenizer with identical ids.

For a folder with only a `tokenizer.model`, `AutoTokenizer` silently returns wrong ids: it drops the dummy
prefix and keeps extra spaces that the model removes. `LlamaTokenizer` loses the prefix before a leading space
and treats every model as BPE. This module reads the rules from the file and checks the result against
SentencePiece.

Remaining differences:
- Control symbols and the unknown symbol (`</s>`, `<unk>`) in a text become their ids, as chat templates need;
  SentencePiece never parses them. The text between two of them is encoded separately.
- `tokenizers` applies a character map (nmt_nfkc and its family) one grapheme at a time. Decomposed (NFD)
  text, or combining marks on characters that the map rewrites, can get other ids and even lose marks.
- Unigram segmentations of equal score, as in a long run of one punctuation mark, depend on rounding, and
  SentencePiece rounds to 32 bits.
- Ids without a text, such as half the bytes of a character, can decode to other replacement marks.
- `skip_special_tokens=True` drops the unknown symbol; otherwise it decodes to its SentencePiece surface.
"""

import json
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

# Files beside a tokenizer.model with further settings.
SETTINGS = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
SETTINGS += ["chat_template.jinja", "chat_template.json"]

Piece = ModelProto.SentencePiece
SPACE = "▁"
PROBES = ["", " ", "   ", "a", " a", "  a", "a ", "a  ", "a b", "a   b", "\n", " \n\n", "a \n b\n", "\ta\tb"]
PROBES += ["a\r\nb\r", "Hello, world!", "12 dogs; 3.14 - 1000000?!", "(a) [b] {c} <d> #$%&*+/=@\\^_`|~"]
PROBES += ["naïve CAFÉ", "½ ② ﬁ Ａ", "你好,世界 日 本", "привет мир", "a 😀😀 b👍🏽", "\u00a0a\u3000b\x01"]
PROBES += ["\x01", SPACE, f"a{SPACE}", f"{SPACE}a b", "<0x0A>", "x <0xE2>"]


def load_sentencepiece_folder(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with a `tokenizer.model` and no `tokenizer.json`.

    Ids are identical to SentencePiece. Added tokens, BOS, special tokens and the chat template come from the
    other files of the folder, if any. Raises ValueError like `load_sentencepiece_tokenizer`, and when added
    tokens do not follow the model's pieces.
    """
    tokenizer = load_sentencepiece_tokenizer(folder / "tokenizer.model")
    if not any((folder / name).exists() for name in SETTINGS):
        return tokenizer
    settings = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    backend = tokenizer.backend_tokenizer
    for _, token in sorted(settings.added_tokens_decoder.items()):
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
    for token, index in _declared_ids(folder).items():
        if backend.token_to_id(token) != index:
            raise ValueError(
                f"{folder}: added token {token!r} should have id {index}, but after the pieces of"
                f" tokenizer.model it has id {backend.token_to_id(token)}"
            )
    bos = settings.bos_token_id
    if bos is not None and settings("a").input_ids[:1] == [bos]:
        special = [(settings.bos_token, bos)]
        backend.post_processor = TemplateProcessing(
            single=f"{settings.bos_token} $A", pair=f"{settings.bos_token} $A $B", special_tokens=special
        )
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings.special_tokens_map
    )
    loaded.chat_template = settings.chat_template
    loaded.name_or_path = str(folder)
    return loaded


def _declared_ids(folder: Path) -> dict[str, int]:
    """Added tokens and their ids, from the files of the folder."""
    added, config = (
        json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        for name in ("added_tokens.json", "tokenizer_config.json")
    )
    return added | {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}


def load_sentencepiece_tokenizer(model_file: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer with the ids and decoded text of SentencePiece. It adds no BOS or EOS.

    The dummy prefix, if the model has one, is a `Prepend` normaliser, which callers can drop to encode a
    continuation. Raises ValueError, naming the file, for anything but a SentencePiece model, for unsupported
    features, and if a probe text gets other ids than from SentencePiece.
    """
    try:
        reference = SentencePieceProcessor(model_file=str(model_file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{model_file}: not a readable SentencePiece model ({error})") from error
    proto = ModelProto.FromString(reference.serialized_model_proto())
    unused = any(piece.type == Piece.UNUSED for piece in proto.pieces)
    known_type = proto.trainer_spec.model_type in (TrainerSpec.UNIGRAM, TrainerSpec.BPE)
    if not known_type or unused or proto.denormalizer_spec.precompiled_charsmap:
        raise ValueError(
            f"{model_file}: only BPE and unigram, without unused pieces or a denormalizer, are supported"
        )

    symbols = [piece.piece for piece in proto.pieces if piece.type == Piece.USER_DEFINED]
    backend = Tokenizer(_build_model(proto, reference.unk_id(), bool(symbols)))
    backend.normalizer = _build_normalizer(proto)
    backend.pre_tokenizer = _build_pre_tokenizer(proto, symbols)
    backend.decoder = _build_decoder(proto, reference.id_to_piece(reference.unk_id()))
    control = [piece.piece for piece in proto.pieces if piece.type == Piece.CONTROL]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    ids = {name: getattr(reference, f"{name}_id")() for name in ("bos", "eos", "unk", "pad")}
    roles = {f"{name}_token": reference.id_to_piece(index) for name, index in ids.items() if index >= 0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)

    for text in [*PROBES, *symbols, *(f" a {symbol} b{symbol}{symbol}\n" for symbol in symbols)]:
        expected, ids = reference.encode(text), tokenizer.encode(text)
        if ids != expected:
            raise ValueError(f"{model_file}: {text!r} gives ids {ids}, SentencePiece gives {expected}")
        expected_text, decoded = reference.decode(expected), tokenizer.decode(ids)
        if decoded != expected_text:
            raise ValueError(
                f"{model_file}: {ids} decodes to {decoded!r}, SentencePiece gives {expected_text!r}"
            )
    return tokenizer


def _build_model(proto: ModelProto, unk_id: int, has_symbols: bool) -> models.Model:
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    byte_fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        return models.Unigram(scores, unk_id=unk_id, byte_fallback=byte_fallback)
    vocab = {piece: index for index, (piece, _) in enumerate(scores)}
    # The file stores no merges, only their scores; merges create only normal pieces.
    merges = generate_merges(
        vocab, dict(scores), [piece.piece for piece in proto.pieces if piece.type != Piece.NORMAL]
    )
    # The pre-tokenizer isolates user-defined symbols, which have no merges.
    options = {"fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": has_symbols}
    return models.BPE(vocab, merges, unk_token=proto.pieces[unk_id].piece, **options)


def _build_normalizer(proto: ModelProto) -> normalizers.Normalizer:
    spec, steps = proto.normalizer_spec, []
    if spec.precompiled_charsmap:
        charsmap = normalizers.Precompiled(spec.precompiled_charsmap)
        # "\r\n" is one grapheme: the map would make it one space, SentencePiece makes it two.
        steps += [normalizers.Replace(Regex(r"\r(?=\n)"), charsmap.normalize_str("\r")), charsmap]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    if spec.add_dummy_prefix:
        # An empty text gets no prefix; if the model removes extra spaces, emptiness is tested after that.
        steps.insert(len(steps) if spec.remove_extra_whitespaces else 0, normalizers.Prepend(SPACE))
    return normalizers.Sequence(steps)


def _build_pre_tokenizer(proto: ModelProto, symbols: list[str]) -> pre_tokenizers.PreTokenizer:
    """Split the normalised text only where no piece can cross; SentencePiece does not split at spaces."""
    steps = []
    if symbols:
        # Added tokens are split off before normalisation, so each part would get its own dummy prefix.
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if proto.trainer_spec.byte_fallback and (symbols or proto.trainer_spec.model_type == TrainerSpec.UNIGRAM):
        # Otherwise the name of a byte piece in the text would become that byte.
        steps.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    return pre_tokenizers.Sequence(steps)


def _build_decoder(proto: ModelProto, unk_piece: str) -> decoders.Decoder:
    spec = proto.normalizer_spec
    steps = [decoders.Replace(unk_piece, proto.trainer_spec.unk_surface)]
    steps += [decoders.ByteFallback()] if proto.trainer_spec.byte_fallback else []
    steps.append(decoders.Fuse())
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        # Must precede the replacement of SPACE: the surface of the unknown piece starts with a real space.
        prefix = Regex(rf"\A{SPACE}+" if spec.remove_extra_whitespaces else rf"\A{SPACE}")
        steps.append(decoders.Replace(prefix, ""))
    return decoders.Sequence([*steps, decoders.Replace(SPACE, " ")])
