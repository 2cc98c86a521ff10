"""Names of data sources: weights, splits, folders with several splits, hub datasets, errors."""

import json
from pathlib import Path

import pytest

from common.data import sources as module
from common.data.sources import Source, files_of, files_to_read, parse_source, repetitions
from common.model.model_files import read_config
from common.runtime.options import TrainOptions, UserError
from common.text.tokenizer import load_tokenizer
from common.training import run_folder
from common.training.run_folder import fingerprint
from step3_ppo.options import PPOOptions


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("F.jsonl", Source("F.jsonl")), ("F.jsonl:0.4", Source("F.jsonl", 0.4)),
        ("F.csv:2", Source("F.csv", 2)), ("F.jsonl:.5", Source("F.jsonl", 0.5)),
        ("a:b/F.json", Source("a:b/F.json")),
        ("a:1/F.json:3", Source("a:1/F.json", 3.0)), ("me/chat", Source("me/chat")),
        ("me/chat:0.5", Source("me/chat", 0.5)), ("me/chat:train_sft", Source("me/chat", split="train_sft")),
        ("me/chat:train_sft:0.5", Source("me/chat", 0.5, "train_sft")),
        ("me/chat:main:test", Source("me/chat", 1.0, "test", "main")),
    ],
)  # fmt: skip
def test_names_weights_and_splits(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e9", "101", "0.0"])
def test_invalid_weights_are_refused(weight):
    with pytest.raises(UserError, match="weight after the colon must be above 0 and at most 100"):
        parse_source(f"F.jsonl:{weight}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F.jsonl:train", "only a weight may follow the name of a file"),
        ("F.jsonl:", "only a weight"),
        ("me/chat:a:b:c", "must be NAME, NAME:SPLIT or NAME:CONFIG:SPLIT"),
        ("me/chat::train", "must be NAME"),
    ],
)
def test_invalid_parts_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_source(text)


def test_a_folder_that_looks_like_a_weight_is_a_folder(tmp_path):
    (tmp_path / "run:2").mkdir()
    assert parse_source(str(tmp_path / "run:2")) == Source(str(tmp_path / "run:2"))
    assert parse_source(f"{tmp_path / 'run:2'}:0.5").weight == 0.5


def test_repetitions_of_a_record():
    cases = ((2.5, 0.4), (2.5, 0.6), (0.3, 0.2), (0.3, 0.3))
    assert [repetitions(*case) for case in cases] == [3, 2, 1, 0]


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")
    return path


def names(text: str, is_training: bool = True) -> list[str]:
    source = parse_source(text)
    return [str(Path(file).relative_to(source.name)) for file in files_of(source, is_training)]


def test_training_reads_and_logs_the_train_files_of_a_folder(tmp_path, capsys):
    data = folder(tmp_path, "train.jsonl", "test.jsonl", "my-validation.json", "notes.txt")
    assert names(str(data)) == ["train.jsonl"]
    for split, file in (
        ("test", "test.jsonl"),
        ("validation", "my-validation.json"),
        ("val", "my-validation.json"),
    ):
        assert names(f"{data}:{split}") == [file]
    files_to_read(parse_source(str(data)))
    assert (
        f"{data}: reading train.jsonl; not reading my-validation.json test.jsonl" in capsys.readouterr().out
    )
    with pytest.raises(
        UserError, match="has the splits test, train, validation; name one, as in .*:validation"
    ):
        names(str(data), is_training=False)
    with pytest.raises(UserError, match=":dev2: no such split; it has test, train, validation"):
        names(f"{data}:dev2")


def test_folder_without_split_names_uses_all_files(tmp_path):
    data = folder(tmp_path, "b.jsonl", "a.jsonl", ".hidden.jsonl", "contest.jsonl")
    for is_training in (True, False):
        assert names(str(data), is_training) == ["a.jsonl", "b.jsonl", "contest.jsonl"]


def test_files_without_a_split_are_training_data(tmp_path):
    data = folder(tmp_path, "extra.jsonl", "train.jsonl", "eval.jsonl")
    assert names(str(data)) == ["extra.jsonl", "train.jsonl"]
    assert names(f"{data}:test") == ["eval.jsonl"]


def test_a_copy_of_a_hub_dataset(tmp_path):
    shards = [
        f"data/{split}-0000{n}-of-00002-ab.parquet" for split in ("test_sft", "train_sft") for n in (0, 1)
    ]
    data = folder(tmp_path / "one", "README.md", *shards)
    assert names(f"{data}:train_sft") == shards[2:]
    with pytest.raises(UserError, match="has the splits test_sft, train_sft; name one"):
        names(str(data))
    data = folder(tmp_path / "two", "train/part-1.jsonl", "test/part-1.jsonl", "checkpoints/metrics.jsonl")
    assert names(str(data)) == ["train/part-1.jsonl"]


def test_metadata_files_are_not_data(tmp_path):
    data = folder(tmp_path, "dataset_infos.json", "state.json", "data/train-00000-of-00001.parquet")
    assert names(str(data)) == ["data/train-00000-of-00001.parquet"]
    folder(data, "dataset_info.json", "own.json")
    assert names(str(data)) == ["own.json"]


def test_a_file_with_the_name_of_the_split_comes_first(tmp_path):
    data = folder(tmp_path, "train_sft.jsonl", "train_gen.jsonl", "eval.jsonl", "my-eval.jsonl")
    assert names(f"{data}:train_sft") == ["train_sft.jsonl"]
    assert names(f"{data}:train_gen") == ["train_gen.jsonl"]
    assert names(f"{data}:train") == ["train_gen.jsonl", "train_sft.jsonl"]
    assert names(f"{data}:eval") == ["eval.jsonl"]


def test_a_name_that_is_too_long_is_one_line():
    name = "x" * 300
    for path in (f"{name}.jsonl", f"/{name}", f"./{name}/a.jsonl:0.5"):
        with pytest.raises(UserError, match="x: No such file|jsonl: No such file"):
            files_of(parse_source(path))
    for load in (load_tokenizer, read_config):
        with pytest.raises(UserError) as error:
            load(f"./{name}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no.jsonl", "./no", "/no/where", "a/b/c", "~/no"])
def test_missing_path_is_not_a_hub_name(name):
    with pytest.raises(UserError, match=f"{name}: No such file"):
        files_of(parse_source(name))


def test_folder_without_data_lists_allowed_kinds(tmp_path):
    with pytest.raises(UserError, match=r"a folder without data files; allowed: \.jsonl"):
        files_of(parse_source(str(tmp_path)))


@pytest.fixture
def hub(monkeypatch):
    """A hub with a dataset of two configs and an unreachable one."""
    import datasets

    def split_names(name: str, config: str | None) -> list[str]:
        if name == "me/two":
            return ["train_sft", "test_sft"]
        if name != "me/chat":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nRetry later")
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'one']")
        return ["train"] if config == "one" else ["train", "test_sft"]

    monkeypatch.setattr(datasets, "get_dataset_split_names", split_names)
    module.hub_splits.cache_clear()
    yield
    module.hub_splits.cache_clear()


@pytest.mark.usefixtures("hub")
def test_splits_of_a_hub_dataset(capsys):
    assert files_to_read(parse_source("me/chat:main:test_sft")) == ["me/chat:main:test_sft"]
    assert "me/chat: reading me/chat:main:test_sft from the hub" in capsys.readouterr().out
    assert parse_source("me/chat:main:test_sft").config == "main"
    missing = "not a local file or folder, and not loadable from the hub"
    for text, is_training, message in (
        (
            "me/chat",
            True,
            f"me/chat: {missing}: Config name is missing. Please pick one",
        ),
        ("me/two", True, "me/two: has the splits train_sft, test_sft; name one, as in me/two:test_sft"),
        (
            "me/char",
            True,
            f"me/char: {missing}: Couldn't reach 'me/char' on the Hub",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            files_of(parse_source(text), is_training)
        assert "\n" not in str(error.value)


def test_fingerprint_holds_the_version_of_an_engine_in_use(monkeypatch):
    monkeypatch.setattr(run_folder, "installed_version", lambda: "vllm 0.32.0")
    assert fingerprint(PPOOptions(), {}) == {}
    assert fingerprint(PPOOptions(rollout_engine="vllm"), {}) == {"the version of vLLM": "vllm 0.32.0"}


def test_fingerprint_holds_the_files_in_use(tmp_path):
    data = folder(tmp_path, "train.jsonl", "test.jsonl", "notes.txt")
    options = TrainOptions(train_data=[str(data)], eval_data=[f"{data}:test"])
    before = fingerprint(options, {})
    (data / "notes.txt").write_text("other notes")
    assert fingerprint(options, {}) == before
    (data / "test.jsonl").write_text("other records")
    after = fingerprint(options, {})
    assert after["--train_data 1"] == before["--train_data 1"]
    assert after["--eval_data 1"] != before["--eval_data 1"]
