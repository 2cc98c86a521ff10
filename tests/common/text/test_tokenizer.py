"""Loading and encoding, with all common kinds of tokenizers: trained here, and real ones."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common.runtime.options import UserError
from common.text.conversation import DEFAULT_CHAT_TEMPLATE, Segment
from common.text.segments import demonstration_segments, prompt_segments
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from tests.conftest import SHARED

CORPUS = [
    "Once upon a time there was a little girl named Lily. She had a big red ball.",
    "The dog ran in the park until the end of the day, and they were happy.",
    "Human: what is this? Assistant: it is a big ball!",
] * 4
PAIRS = [
    ("Once upon", " a time there was a little girl"),
    ("Once upon a time.", " She had a ball. They were happy!"),
    ("The dog", " ran"),
    ("Human: what is this? Assistant:", " it is a big ball"),
]
MADE = ["byte_level", "byte_level_prefix", "metaspace_first", "metaspace_always", "prepend"]
REAL = {
    "smollm2": "tokenizers/smollm2",
    "stories260K": "models/stories260K",
    "sp-unigram-1k": "tokenizers/sp-unigram-1k/tokenizer.model",
}


def make(kind: str, folder: Path) -> Path:
    """Train a small BPE tokenizer of the given kind; those with a prefix also add <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "prepend"))
    alphabet = []
    if kind.startswith("byte_level"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        tokenizer.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    elif kind.startswith("metaspace"):
        scheme = kind.removeprefix("metaspace_")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    else:  # as in Llama 2: words are split only in training
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "prepend":
        tokenizer.pre_tokenizer = None
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    if kind != "byte_level":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        names["bos_token"] = "<s>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[*MADE, *REAL])
def encoder(request, tmp_path_factory) -> SegmentEncoder:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in MADE:
        return SegmentEncoder(load_tokenizer(str(make(request.param, folder))))
    source = request.getfixturevalue("shared") / REAL[request.param]
    if source.suffix == ".model":  # only the SentencePiece file
        shutil.copy(source, folder)
        source = folder
    return SegmentEncoder(load_tokenizer(str(source)))


def response(text: str) -> Segment:
    return Segment(text, is_response=True, ends=True)


def test_pad_differs_from_other_special_tokens(encoder):
    tokenizer = encoder.tokenizer
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_pad_is_new_if_all_special_tokens_are_one(tmp_path):
    """As in GPT-2, where BOS, EOS and the unknown token are the same."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(make("byte_level", tmp_path))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **names).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "<|pad|>"
    assert loaded.pad_token_id == len(tokenizer)


def test_one_bos_exactly_when_the_tokenizer_adds_it(encoder):
    bos = encoder.tokenizer.bos_token_id
    adds = bos is not None and bos in encoder.tokenizer("Once upon").input_ids
    for prompt, answer in PAIRS:
        ids, _ = encoder.encode([Segment(prompt), response(answer)])
        assert ids.count(bos) == adds
        assert (ids[0] == bos) == adds


def test_bos_written_by_a_template_is_not_doubled(encoder):
    bos = encoder.tokenizer.bos_token
    if bos is None:
        pytest.skip("this tokenizer has no BOS")
    ids, _ = encoder.encode([Segment(bos + "Once upon"), response(" a time")])
    assert ids.count(encoder.tokenizer.bos_token_id) == 1


def test_one_eos_at_the_end(encoder):
    for prompt, answer in PAIRS:
        ids, is_response = encoder.encode([Segment(prompt), response(answer)])
        assert ids.count(encoder.eos_token_id) == 1 and ids[-1] == encoder.eos_token_id
        assert is_response[-1] and len(is_response) == len(ids)


def test_one_eos_if_the_text_already_ends_with_it(encoder):
    eos = encoder.tokenizer.eos_token
    ids, is_response = encoder.encode([Segment("Once upon"), response(" a time" + eos)])
    assert (ids, is_response) == encoder.encode([Segment("Once upon"), response(" a time")])


def test_prompt_ids_are_the_same_with_and_without_response(encoder):
    for prompt, answer in PAIRS:
        alone, _ = encoder.encode([Segment(prompt)])
        ids, is_response = encoder.encode([Segment(prompt), response(answer)])
        assert ids[: len(alone)] == alone
        assert is_response == [False] * len(alone) + [True] * (len(ids) - len(alone))


def test_continuation_has_the_ids_of_the_joined_text(encoder):
    """At a word boundary, no dummy space is added between prompt and response."""
    for prompt, answer in PAIRS:
        ids = encoder.tokenizer(prompt + answer).input_ids
        ids = ids[:-1] if ids[-1] == encoder.eos_token_id else ids
        assert encoder.encode([Segment(prompt), response(answer)])[0] == [*ids, encoder.eos_token_id]


def test_decoding_keeps_the_leading_space_of_a_response(encoder):
    for prompt, answer in PAIRS:
        prompt_ids, _ = encoder.encode([Segment(prompt)])
        ids, _ = encoder.encode([Segment(prompt), response(answer)])
        assert encoder.decode_response(prompt_ids, ids[len(prompt_ids) :]) == answer


def test_conversation_round_trip(encoder):
    if "sp-unigram" in str(encoder.tokenizer.name_or_path) or encoder.tokenizer("\n\n").input_ids == []:
        pytest.skip("this tokenizer has no newlines")
    turns = [("user", "Once upon"), ("assistant", "a time"), ("user", "The dog"), ("assistant", "ran")]
    messages = [{"role": role, "content": content} for role, content in turns]
    eos = encoder.tokenizer.eos_token
    prompt, _ = encoder.encode(prompt_segments(messages[:3], encoder.render, eos))
    ids, is_response = encoder.encode(demonstration_segments({"messages": messages}, encoder.render, eos))
    assert ids[: len(prompt)] == prompt
    learnt = [i for i, is_learnt in zip(ids, is_response, strict=True) if is_learnt]
    assert learnt.count(encoder.eos_token_id) == 2
    assert encoder.decode_response(prompt, ids[len(prompt) :]).strip() == "ran"


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs {SHARED}")
def test_stories_continuation_is_the_same_text():
    encoder = SegmentEncoder(load_tokenizer(str(SHARED / "models/stories260K")))
    ids, _ = encoder.encode([Segment("Once upon"), response(" a time")])
    assert ids == [*encoder.tokenizer("Once upon a time").input_ids, encoder.eos_token_id]


def test_default_template_only_for_tokenizers_without_one(tmp_path):
    folder = make("byte_level", tmp_path)
    assert load_tokenizer(str(folder)).chat_template == DEFAULT_CHAT_TEMPLATE
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == "{{ messages }}"


def test_saved_tokenizer_loads_unchanged(tmp_path):
    first = load_tokenizer(str(make("byte_level_prefix", tmp_path / "a")))
    first.save_pretrained(tmp_path / "b")
    second = load_tokenizer(str(tmp_path / "b"))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert (first.pad_token, first.chat_template) == (second.pad_token, second.chat_template)


@pytest.mark.parametrize(
    "roles, chat_template",
    [
        (["user", "assistant"], "{{ raise_exception('roles must alternate') }}"),
        (["assistant"], DEFAULT_CHAT_TEMPLATE),
    ],
    ids=["the template raises", "nothing before the reply"],
)
def test_conversation_that_a_template_rejects_is_a_bad_record(tmp_path, roles, chat_template):
    """ValueError, so that the error has file and line, or the record is skipped."""
    tokenizer = load_tokenizer(str(make("byte_level", tmp_path)))
    tokenizer.chat_template = chat_template
    messages = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(ValueError):
        demonstration_segments({"messages": messages}, SegmentEncoder(tokenizer).render, "</s>")


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            "system",
        ),
        ("{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}", "user"),
        ("{% for m in messages %}{{ m.content if m.role != 'assistant' }}{% endfor %}", "assistant"),
    ],
)
def test_message_that_the_template_ignores_is_a_bad_record(tmp_path, template, role):
    """No message is lost silently; conversations without that role are rendered."""
    tokenizer = load_tokenizer(str(make("byte_level", tmp_path)))
    tokenizer.chat_template = template
    encoder = SegmentEncoder(tokenizer)
    messages = [{"role": name, "content": "a"} for name in ("user", "assistant")]
    if role == "system":
        assert encoder.render(messages, False) == "aa"
        messages.insert(0, {"role": "system", "content": "b"})
    with pytest.raises(ValueError, match=f"chat template of .* ignores {role} messages"):
        demonstration_segments({"messages": messages}, encoder.render, "</s>")


BAD_FILES = {
    "cut": ("tokenizer.json", '{"version": ', "tokenizer.json: not readable as JSON: Expecting"),
    "binary": (
        "tokenizer_config.json",
        b"\xff\xfe{}",
        "tokenizer_config.json: not readable as JSON: 'utf-8'",
    ),
    "a list": ("tokenizer.json", "[]", "tokenizer.json: must be a JSON object, not list"),
    "EOS of a wrong type": (
        "tokenizer_config.json",
        {"eos_token": 5},
        "tokenizer_config.json: eos_token is 5; it must be a token",
    ),
    "length of a wrong type": (
        "tokenizer_config.json",
        {"model_max_length": "x"},
        "tokenizer_config.json: model_max_length is 'x'; it must be a number",
    ),
    "class of a wrong type": ("tokenizer_config.json", {"tokenizer_class": 7}, "must be text"),
    "ids of a wrong type": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"one": {"content": "a"}}},
        "an object with a token for each id",
    ),
    "templates without names": (
        "tokenizer_config.json",
        {"chat_template": [{"a": 1}]},
        "a list of templates",
    ),
    "template of a wrong type": (
        "tokenizer_config.json",
        {"chat_template": 3},
        "tokenizer_config.json: chat_template is 3; it must",
    ),
    "custom code": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "T"},
        "needs custom code, which is not run",
    ),
}


@pytest.mark.parametrize("file, content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_tokenizer_is_one_line(tmp_path, monkeypatch, file, content, message):
    folder = make("byte_level", tmp_path)
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked a question"))
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_tokenizer(str(folder))
    assert message in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_tokenizer_and_no_eos_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no usable tokenizer: the folder has none of"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="absent: No such folder"):
        load_tokenizer(str(tmp_path / "absent"))
    folder = make("byte_level", tmp_path / "made")
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)
    with pytest.raises(UserError, match="no EOS"):
        load_tokenizer(str(folder))


def test_decoded_prompt_has_role_markers_but_no_other_special_tokens():
    words = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "Hello"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<pad>"))
    markers = {"additional_special_tokens": ["<|user|>", "<|assistant|>"]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **markers
    )
    assert SegmentEncoder(tokenizer).decode_prompt([2, 2, 0, 3, 5, 1, 4]) == "<|user|> Hello <|assistant|>"
