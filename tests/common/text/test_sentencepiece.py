"""Same ids as SentencePiece, with models trained here and real models."""

import io
import json
import random
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

from common.runtime.options import UserError
from common.text.sentencepiece import load_sentencepiece_tokenizer
from common.text.tokenizer import load_tokenizer
from tests.conftest import SHARED

SHARED_MODELS = ("tokenizers/sp-unigram-1k/tokenizer.model", "models/stories260K/tokenizer.model")
SYMBOLS = ["<|user|>", "<sep>"]
CORPUS = [
    "Once upon a time there was a little girl called Lily, and she had a big red ball.",
    'She said: "Don\'t be late!" The 3 dogs ran 12.5 miles -- or was it 25?',
    "  def add(a, b):    return a + b    # two    spaces,  or more",
    "naïve café, größer, señor; 你好 世界 and привет мир",
    "They were happy and they played in the park until the end of the day.",
] * 8
WRITTEN = [
    "",
    " ",
    "      ",
    "\n",
    "\n\n\n",
    "\t",
    " \n ",
    "Once upon a time",
    " She",
    "  She",
    "She ",
    "a   b  ",
]
WRITTEN += ["line one\nline two\r\n\r\nthree\r", "▁", "a▁b ▁ c▁", "½ cup of ﬁne ＡＢＣ", "日本語 テキスト"]
WRITTEN += ["👩‍👩‍👧 👍🏽 ☃️ 🇫🇷", "3.14159 + 2,000 = ?", "zero\u200bwidth nb\u00a0space", "\x00\x01", "\x01"]
WRITTEN += [
    "<|user|>",
    " <|user|>  hi<sep><sep> \n<|user|>\n",
    "<|user|<sep>>",
    "a<|use",
    "<sep><0x0A> <0xE2>",
]
WRITTEN += ["<0x0A>", "x" * 300, "the cat " * 200]
# No runs of punctuation: their unigram scores can be equal, so that rounding decides.
ALPHABET = [*"abehlnost AZ09,?'<|>éüß你好世😀▁ﬁ½\n\t\u00a0", "👍🏽", "e\u0301", "\r\n", " ", "  ", "   "]
ALPHABET += ["the", " she", " and", "<|user|>", "<sep>", "<0x0A>"]


def texts() -> list[str]:
    rng = random.Random(7)
    return WRITTEN + ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 25))) for _ in range(800)]


def train(path: Path, **options) -> Path:
    model = io.BytesIO()
    defaults = {"vocab_size": 420, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **(defaults | options))
    path.write_bytes(model.getvalue())
    return path


def assert_parity(tokenizer, model_file: Path) -> None:
    reference = SentencePieceProcessor(model_file=str(model_file))
    for text in texts():
        expected = reference.encode(text)
        assert tokenizer.encode(text) == expected, repr(text)
        assert tokenizer.decode(expected) == reference.decode(expected), repr(text)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("prefix, clean", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("symbols", [[], SYMBOLS], ids=["plain", "symbols"])
def test_trained_models_match_before_and_after_reloading(
    tmp_path, model_type, byte_fallback, rule, prefix, clean, symbols
):
    model_file = train(
        tmp_path / "tokenizer.model",
        model_type=model_type,
        byte_fallback=byte_fallback,
        normalization_rule_name=rule,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=clean,
        user_defined_symbols=symbols,
    )
    tokenizer = load_sentencepiece_tokenizer(model_file)
    assert_parity(tokenizer, model_file)
    tokenizer.save_pretrained(tmp_path / "saved")
    # A checkpoint has a model configuration, and AutoTokenizer chooses the class by its model type.
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert_parity(reloaded, model_file)
    assert reloaded.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_real_models_match(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs {SHARED / name}")
    assert_parity(load_sentencepiece_tokenizer(SHARED / name), SHARED / name)


def test_special_tokens_have_the_ids_of_the_file_and_are_parsed_from_text(tmp_path):
    model_file = train(
        tmp_path / "m.model", model_type="bpe", pad_id=3, bos_id=-1, control_symbols=["<|end|>"]
    )
    tokenizer, reference = (
        load_sentencepiece_tokenizer(model_file),
        SentencePieceProcessor(model_file=str(model_file)),
    )
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token_id == reference.pad_id() == 3
    assert tokenizer.eos_token_id == reference.eos_id()
    assert tokenizer.unk_token_id == reference.unk_id()
    end, eos = reference.piece_to_id("<|end|>"), reference.eos_id()
    expected = [*reference.encode("She was"), end, *reference.encode(" happy"), eos]
    assert tokenizer.encode("She was<|end|> happy</s>") == expected
    assert tokenizer.decode(expected, skip_special_tokens=True) == reference.decode(expected)


@pytest.mark.parametrize("prefix", [True, False])
def test_dummy_prefix_is_a_prepend_step(tmp_path, prefix):
    tokenizer = load_sentencepiece_tokenizer(train(tmp_path / "m.model", add_dummy_prefix=prefix))
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]["normalizers"]
    assert [step for step in steps if step["type"] == "Prepend"] == [
        {"type": "Prepend", "prepend": "▁"}
    ] * prefix


@pytest.mark.parametrize("content", [b"", b"not a model" * 50, None], ids=["empty", "garbage", "truncated"])
def test_corrupt_file_is_named(tmp_path, content):
    model_file = train(tmp_path / "broken.model")
    model_file.write_bytes(model_file.read_bytes()[:3000] if content is None else content)
    with pytest.raises(ValueError, match="broken.model: not a readable"):
        load_sentencepiece_tokenizer(model_file)
    with pytest.raises(ValueError, match="missing.model: not a readable"):
        load_sentencepiece_tokenizer(tmp_path / "missing.model")


def test_unsupported_models_are_refused(tmp_path):
    model_file = train(tmp_path / "m.model", model_type="char")
    with pytest.raises(ValueError, match="m.model: only BPE and unigram"):
        load_sentencepiece_tokenizer(model_file)
    model_file = train(tmp_path / "suffix.model", treat_whitespace_as_suffix=True)
    with pytest.raises(ValueError, match=r"suffix.model: '.*' gives ids \[.*\], SentencePiece gives \["):
        load_sentencepiece_tokenizer(model_file)
    proto = ModelProto.FromString(train(tmp_path / "unused.model", model_type="bpe").read_bytes())
    proto.pieces[-1].type = ModelProto.SentencePiece.UNUSED
    (tmp_path / "unused.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="unused.model: only BPE and unigram"):
        load_sentencepiece_tokenizer(tmp_path / "unused.model")


@pytest.mark.parametrize("model", ["tokenizers/sp-unigram-1k", "models/stories260K"])
def test_folder_settings_are_used(shared, tmp_path, model):
    """Added tokens, BOS, EOS, pad and chat template come from the folder; ids of text from SentencePiece."""
    shutil.copy(shared / model / "tokenizer.model", tmp_path)
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    size = pieces.vocab_size()
    added = {"<|turn|>": size, "<|stop|>": size + 1, "<filler>": size + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    template = "{% for m in messages %}<|turn|>{{ m.role }}:{{ m.content }}<|stop|>{% endfor %}"
    config = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>",
        "eos_token": "<|stop|>", "pad_token": "<filler>", "unk_token": "<unk>", "chat_template": template,
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in added.items()},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer) == size + 3
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (size + 1, size + 2)
    assert tokenizer.chat_template == template
    for text in ("Once upon a time", "a  b\nc", "naïve ½"):
        assert tokenizer(text).input_ids == [pieces.bos_id(), *pieces.encode(text)]
    assert tokenizer.encode("<|turn|>", add_special_tokens=False) == [size]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"))("Once upon").input_ids == tokenizer("Once upon").input_ids


def test_added_tokens_must_follow_the_pieces(shared, tmp_path):
    shutil.copy(shared / "models/stories260K/tokenizer.model", tmp_path)
    decoder = {"600": {"content": "<|stop|>", "special": True}}
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|stop|>", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'<\|stop\|>' should have id 600, but .* it has id 512"):
        load_tokenizer(str(tmp_path))
