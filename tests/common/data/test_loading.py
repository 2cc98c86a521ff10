"""Loading of data files, held-out split, order of examples, micro-batches of ranks."""

import csv
import json
import math
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from common.data.batching import (
    batch_order,
    deal,
    examples_of_steps,
    indices_of_round,
    pad_rows,
    padding_share,
    steps_in_epochs,
)
from common.data.loading import load_examples
from common.data.multi_encoder import load_shared_records
from common.data.records import read_all
from common.runtime.options import DataOptions, UserError
from common.text.segments import demonstration_segments, find_prompt
from common.text.tokenizer import SegmentEncoder, load_tokenizer
from common.text.truncation import Dropped
from step1_sft.data import Demonstration, tokenize_demonstration
from step1_sft.options import SFTOptions
from step2_reward.options import RewardOptions
from step3_ppo.options import PPOOptions

RECORDS = [{"prompt": f"question {i % 40}", "completion": f"answer {i}"} for i in range(200)]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Put the caches of Triptych and `datasets` into the folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


class Pair(NamedTuple):
    prompt: str
    completion: str

    @property
    def length(self) -> int:
        return len(self.completion)


def convert(record: dict) -> tuple[Pair, bool]:
    """A strict converter without a tokenizer."""
    prompt, response = demonstration_segments(record, None, "</s>")
    return Pair(prompt.text, response.text), False


def as_json(record: dict) -> tuple[Pair, bool]:
    """A converter that accepts everything."""
    return Pair("", json.dumps(record)), False


def drop(_: dict) -> tuple[Pair, bool]:
    raise Dropped("too dull")


load = partial(load_examples, row_class=Pair, convert=convert)
ALL = DataOptions(eval_fraction=0.0)


# Files


def write_as(kind: str, folder: Path) -> str:
    import datasets

    path = folder / f"records.{kind}"
    if kind == "jsonl":
        write(path, RECORDS)
    elif kind == "json":
        path.write_text(json.dumps(RECORDS))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(RECORDS)
    else:
        datasets.Dataset.from_list(RECORDS).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, kind):
    examples, _ = load([write_as(kind, tmp_path)], ALL)
    assert list(examples) == [(r["prompt"], r["completion"]) for r in RECORDS]


def test_several_files_are_read_in_order(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", RECORDS[i : i + 2]) for i in (4, 0)]
    examples, _ = load(files, ALL)
    assert [completion for _, completion in examples] == ["answer 4", "answer 5", "answer 0", "answer 1"]


def test_folder_is_read_in_order_of_its_files(tmp_path):
    for name, part in (("b.jsonl", RECORDS[2:4]), ("a.jsonl", RECORDS[:2])):
        write(tmp_path / name, part)
    (tmp_path / "notes.txt").write_text("not data")
    clicks = write(tmp_path / "a.clicks.jsonl", RECORDS[4:])
    examples, _ = load([str(tmp_path)], ALL)
    assert [completion for _, completion in examples] == ["answer 0", "answer 1", "answer 2", "answer 3"]
    assert len(load([clicks], ALL)[0]) == len(RECORDS[4:])  # a file given by name is always read


@pytest.mark.parametrize(("weight", "low", "high"), [("0.3", 0.2, 0.4), ("2", 2, 2), ("1.5", 1.35, 1.65)])
def test_weight_is_the_number_of_repetitions(tmp_path, weight, low, high):
    """Repetitions depend on the content, not on the order, and differ by at most one."""
    records = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(1000)]
    one = write(tmp_path / "one.jsonl", records)
    other = write(tmp_path / "other.jsonl", records[::-1])
    options = ALL
    examples, again = (load([f"{path}:{weight}"], options)[0] for path in (one, other))
    assert low <= len(examples) / len(records) <= high
    assert Counter(examples) == Counter(again)
    counts = Counter(examples)
    assert set(counts.values()) <= {math.ceil(float(weight)), math.floor(float(weight))}
    both, _ = load([f"{one}:{weight}", other], options)
    assert list(both) == [*examples, *load([other], options)[0]]


def test_weight_of_zero_is_refused(tmp_path):
    with pytest.raises(UserError, match="weight after the colon must be above 0"):
        load([write(tmp_path / "one.jsonl", RECORDS) + ":0"], DataOptions())


def test_data_split_gives_each_stage_its_own_prompts(tmp_path):
    records = [{"prompt": f"p{i % 500}", "completion": f"c{i}"} for i in range(1000)]
    files = [write(tmp_path / f"{name}.jsonl", r) for name, r in (("in", records), ("out", records[::-1]))]
    parts = []
    for stage in (SFTOptions, RewardOptions, PPOOptions):
        options = stage(data_split="2,4,4", eval_fraction=0.2, max_eval_samples=0)
        train, held_out = load(files[:1], options)
        again, _ = load(files[1:], options)
        assert set(train) == set(again)
        parts.append({prompt for prompt, _ in [*train, *held_out]})
    assert sum(map(len, parts)) == len(set.union(*parts)) == 500
    assert [len(part) / 500 for part in parts] == pytest.approx([0.2, 0.4, 0.4], abs=0.06)


@pytest.mark.parametrize("split", ["2,4", "a,b,c", "0,1,1", "1,-1,1", "1,1,1,1"])
def test_invalid_data_split_is_refused(tmp_path, split):
    with pytest.raises(UserError, match=f"--data_split {split}: must be three numbers"):
        load([write(tmp_path / "one.jsonl", RECORDS)], SFTOptions(data_split=split))


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.json", "absent.csv", "absent.parquet"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"{name}: No such file"):
        read_all([str(tmp_path / name)], dict)


def test_unknown_kind_of_file_lists_allowed_kinds(tmp_path):
    (tmp_path / "data.txt").write_text("hello")
    with pytest.raises(UserError, match=r"data.txt: unknown kind .* \.jsonl \.json \.csv \.parquet"):
        read_all([str(tmp_path / "data.txt")], dict)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b'{"prompt": "a"}\n\xc3('])
def test_file_that_is_not_text_is_named(tmp_path, content):
    (tmp_path / "binary.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"binary.jsonl:\d: not UTF-8"):
        load([str(tmp_path / "binary.jsonl")], DataOptions(), convert=as_json)


# Bad records

BAD = {
    '{"prompt": "a", ': "not valid JSON",
    '["prompt"]': "must be a JSON object, not list",
    '{"prompt": "a"}': "field 'completion' is missing",
    '{"prompt": "a", "completion": ""}': "field 'completion' is empty",
    '{"prompt": 7, "completion": "b"}': "field 'prompt' is int",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_record_is_an_error_with_file_and_line(tmp_path, line):
    path = Path(write(tmp_path / "data.jsonl", RECORDS[:3]))
    path.write_text(path.read_text() + "\n" + line + "\n" + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(UserError) as error:
        load([str(path)], DataOptions())
    assert str(error.value).startswith(f"{path}:5: ")  # empty lines count
    assert BAD[line] in str(error.value) and "\n" not in str(error.value)


def test_bad_records_are_skipped_and_counted_on_request(tmp_path, capsys):
    path = Path(write(tmp_path / "data.jsonl", RECORDS[:3]))
    path.write_text("\n".join([*BAD, path.read_text(), *BAD]))
    options = DataOptions(skip_bad_records=True, eval_fraction=0.0)
    examples, _ = load([str(path)], options)
    assert [completion for _, completion in examples] == ["answer 0", "answer 1", "answer 2"]
    read, left_out = 2 * len(BAD) + 3, 2 * len(BAD)
    assert f"{read} records read, {left_out} left out: {left_out} bad" in capsys.readouterr().out


def test_record_without_prompt_is_bad_even_if_it_converts(tmp_path, capsys):
    records = [{"messages": [{"role": "assistant", "content": "b"}]}, RECORDS[0]]
    path = write(tmp_path / "data.jsonl", records)
    with pytest.raises(UserError, match="data.jsonl:1: field 'messages' has nothing before"):
        load([path], ALL, convert=as_json)
    options = DataOptions(skip_bad_records=True, eval_fraction=0.0)
    assert [json.loads(row.completion) for row in load([path], options, convert=as_json)[0]] == RECORDS[:1]
    assert "2 records read, 1 left out: 1 bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [TypeError("must be str"), RecursionError("too deep"), IndexError(), OverflowError("x\ny")]
)
def test_any_exception_of_a_library_makes_a_record_bad(tmp_path, capsys, error):
    def fail_at_2(record: dict) -> tuple[Pair, bool]:
        if record["completion"] == "answer 2":
            raise error
        return convert(record)

    path = write(tmp_path / "data.jsonl", RECORDS[:5])
    reason = ": ".join(filter(None, [type(error).__name__, str(error).partition("\n")[0]]))
    with pytest.raises(UserError, match=f"data.jsonl:3: {reason}$"):
        load([path], ALL, convert=fail_at_2)
    skipping = DataOptions(eval_fraction=0.0, skip_bad_records=True)
    assert len(load([path], skipping, convert=fail_at_2)[0]) == 4
    assert f"5 records read, 1 left out: 1 bad, the first at {path}:3: {reason}" in capsys.readouterr().out


def test_no_rows_left_lists_the_reasons(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: no rows left: 0 records read$"):
        load([str(tmp_path / "empty.jsonl")], DataOptions())
    path = write(tmp_path / "short.jsonl", RECORDS[:3])
    with pytest.raises(UserError, match="short.jsonl: no rows left: 3 records read: 3 too dull$"):
        load([path], DataOptions(), convert=drop)
    with pytest.raises(UserError, match="3 records read: 3 left out by the weight of their source$"):
        load([f"{path}:0.000001"], ALL)
    with pytest.raises(UserError, match="1 records read: 1 held out by --eval_fraction$"):
        load([write(tmp_path / "one.jsonl", RECORDS[1:2])], DataOptions(eval_fraction=0.9))
    with pytest.raises(UserError, match="3 records read: 3 used by other steps .--data_split.$"):
        load([path], SFTOptions(data_split="0.000001,1,1"))
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a"}, *RECORDS[:1]])
    with pytest.raises(
        UserError, match=r"2 records read: 1 bad, the first at .*bad.jsonl:1: .*, 1 left out by"
    ):
        load([f"{bad}:0.000001"], DataOptions(skip_bad_records=True))


def test_warning_for_a_large_share_of_records_left_out_or_truncated(tmp_path, capsys):
    path = write(tmp_path / "data.jsonl", RECORDS)

    def warnings(share: float) -> list[str]:
        def some(record: dict) -> tuple[Pair, bool]:
            number = int(record["completion"].split()[1])
            if number < share * len(RECORDS):
                raise Dropped("too long")
            return convert(record)[0], number >= (1 - share * (1 - share)) * len(RECORDS)

        (tmp_path / "data.jsonl").write_text(Path(path).read_text() + "\n" * int(100 * share))  # no cache
        load([path], ALL, convert=some)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]

    assert warnings(0.1) == []
    left_out, cut = (
        "30% of the records are left out",
        "30% of the training rows are truncated to the length limit",
    )
    assert warnings(0.3) == [f"warning: {left_out}", f"warning: {cut}"]


def test_warning_for_a_single_file_that_is_mostly_left_out(tmp_path, capsys):
    """Also for truncated held-out rows."""
    long = [{"prompt": f"p{i}", "completion": "long" if i % 2 else "cut"} for i in range(40)]
    names = write(tmp_path / "data.jsonl", RECORDS), write(tmp_path / "long.jsonl", long)

    def some(record: dict) -> tuple[Pair, bool]:
        if record["completion"] == "long":
            raise Dropped("too long")
        return convert(record)[0], record["completion"] == "cut"

    left_out = f"warning: 50% of the records of {names[1]} are left out"
    load(names, ALL, convert=some)
    assert [line for line in capsys.readouterr().out.splitlines() if "warning" in line] == [left_out]
    load(names[:1], DataOptions(eval_data=[names[1]]), convert=some)
    lines = capsys.readouterr().out.splitlines()
    assert left_out in lines
    assert "warning: 100% of the held-out rows are truncated to the length limit" in lines


def test_warning_for_records_read_without_tokenising(tmp_path, capsys):
    """As the judge and the annotation page read them."""
    bad = [{"prompt": 1}] * 30
    few, many = (
        write(tmp_path / "few.jsonl", RECORDS + bad),
        write(tmp_path / "many.jsonl", RECORDS[:70] + bad),
    )

    def parse(record: dict) -> dict:
        if record["prompt"] == 1:
            raise ValueError("no text")
        return record

    read_all([few, many], parse, skip_bad_records=True)
    assert capsys.readouterr().out == f"warning: 30% of the records of {many} are left out\n"


def test_warning_for_few_held_out_prompts(tmp_path, capsys):
    """Counts distinct prompts after --max_eval_samples; no warning without held-out data."""
    few, many = ([{"prompt": f"q{i % n}", "completion": f"a{i}"} for i in range(100)] for n in (31, 32))
    train = write(tmp_path / "train.jsonl", RECORDS)
    for records, at_most, count in ((few, 0, "31"), (many, 0, ""), (many, 20, "20")):
        held_out = write(tmp_path / "eval.jsonl", records)
        load([train], DataOptions(eval_data=[held_out], max_eval_samples=at_most))
        warned = "held-out prompts; below 32, metrics" in (out := capsys.readouterr().out)
        assert warned == bool(count) and (not count or f"warning: only {count} held-out" in out)
    load([train], ALL)
    assert "held" not in capsys.readouterr().out


def test_weight_selects_the_same_records_in_every_command(tmp_path):
    """Training, evaluation, and commands that do not tokenise."""
    records = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(300)]
    path = write(tmp_path / "data.jsonl", records)
    for weight in ("0.4", "1", "2.3"):
        source = [f"{path}:{weight}"]
        rows, (read, _) = load(source, ALL)[0], read_all(source, dict)
        assert [row.completion for row in rows] == [record["completion"] for record in read]
        alike = load_shared_records(source, ALL, Pair, [convert])
        assert [record["completion"] for record in alike.records] == [row.completion for row in rows]
        assert alike.rows == [list(rows)]


def test_shared_records_are_those_that_all_converters_accept(tmp_path, capsys):
    path = write(tmp_path / "data.jsonl", RECORDS[:30])
    converts = [partial(unless_divisible, by=by) for by in (2, 3)]
    shared = load_shared_records([path], ALL, Pair, converts)
    numbers = [i for i in range(30) if i % 2 and i % 3]
    assert shared.origins == [f"{path}:{i + 1}" for i in numbers]
    assert shared.records == [RECORDS[i] for i in numbers]
    assert [[row.completion for row in rows] for rows in shared.rows] == [
        [f"answer {i}" for i in numbers]
    ] * 2
    assert f"{path}: 10 rows of 30 records; left out: 15 divisible" in capsys.readouterr().out
    assert load_shared_records([path], ALL, Pair, converts, at_most=3).origins == shared.origins[:3]
    with pytest.raises(
        UserError, match="no rows left: 30 records read: 15 divisible, 15 left out for another"
    ):
        load_shared_records([path], ALL, Pair, [converts[0], drop])


def unless_divisible(record: dict, by: int) -> tuple[Pair, bool]:
    if int(record["completion"].split()[1]) % by == 0:
        raise Dropped("divisible")
    return convert(record)


def test_folder_with_train_and_test_files_trains_only_on_train(tmp_path, capsys):
    write(tmp_path / "train-00000-of-00001.jsonl", RECORDS[:50])
    write(tmp_path / "test-00000-of-00001.jsonl", RECORDS[50:100])
    train, held_out = load([str(tmp_path)], DataOptions(eval_data=[f"{tmp_path}:test"]))
    assert [row.completion for row in train] == [record["completion"] for record in RECORDS[:50]]
    assert [row.completion for row in held_out] == [record["completion"] for record in RECORDS[50:100]]
    out = capsys.readouterr().out
    assert f"{tmp_path}: reading train-00000-of-00001.jsonl; not reading test-00000-of-00001.jsonl" in out


# Held-out split

KINDS = {
    "prompts": lambda i: {"prompt": f"question {i % 40}", "completion": f"answer {i}"},
    "messages": lambda i: {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": f"question {i % 40}"},
            {"role": "assistant", "content": f"answer {i}"},
        ]
    },
    "dialogues": lambda i: {"chosen": f"Q: {i % 40} A: yes {i}", "rejected": f"Q: {i % 40} A: no {i}"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_prompts_is_held_out(tmp_path, kind):
    """Also with a system message common to all records, and for preferences without a `prompt` field."""
    records = [KINDS[kind](i) for i in range(400)]
    options = DataOptions(eval_fraction=0.3, max_eval_samples=0)
    split = partial(load, options=options, convert=as_json)
    train, held_out = split([write(tmp_path / "data.jsonl", records)])
    assert len(train) + len(held_out) == 400
    assert 40 < len(held_out) < 200
    prompts = [
        {json.dumps(find_prompt(json.loads(row.completion))) for row in part} for part in (train, held_out)
    ]
    assert not prompts[0] & prompts[1]
    order = np.random.default_rng(0).permutation(400)
    shuffled = split([write(tmp_path / "other.jsonl", [records[i] for i in order])])
    assert [sorted(part) for part in shuffled] == [sorted(train), sorted(held_out)]


def test_eval_data_leaves_all_records_for_training(tmp_path):
    options = DataOptions(eval_data=[write(tmp_path / "eval.jsonl", RECORDS[:9])], max_eval_samples=5)
    train, held_out = load([write(tmp_path / "train.jsonl", RECORDS)], options)
    assert (len(train), len(held_out)) == (200, 5)


def test_data_summary(tmp_path, capsys):
    """Rows, lengths, duplicates with an integer weight, and held-out prompts in the training data."""
    records = [{"prompt": f"p{i}", "completion": "c" * (i + 1)} for i in range(100)]
    data = write(tmp_path / "data.jsonl", [*records, *records[:7]])
    held_out = write(tmp_path / "eval.jsonl", [*records[:3], {"prompt": "new", "completion": "c"}])
    load([f"{data}:2"], DataOptions(eval_data=[held_out]))
    head, train, ours, left_out, leak, few = capsys.readouterr().out.splitlines()
    assert "".join(head.split()) == "datarowstokens:p5medianp95longesttruncatedduplicates"
    assert train.split() == ["training", "214", "3", "47", "95", "100", "0.0%", "7"]
    assert ours.split() == ["held", "out", "4", "1", "1", "2", "3", "0.0%", "0"]
    assert left_out == "111 records read, 0 left out"
    assert leak.startswith("warning: 3 of 4 held-out prompts are also in the training data")
    assert few.startswith("warning: only 4 held-out prompts; below 32")


# Order

LENGTHS = np.random.default_rng(0).integers(1, 500, 103).tolist()


def take(count: int, start: int = 0, grouped: bool = True, seed: int = 0, size: int = 4) -> list[list[int]]:
    return list(islice(batch_order(LENGTHS, size, seed, start, grouped), count))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("size", [1, 4, 7, 64, 103, 200])
def test_an_epoch_shows_every_example(grouped, size):
    batches = take(steps_in_epochs(len(LENGTHS), size, 1), grouped=grouped, size=size)
    seen = Counter(i for batch in batches for i in batch)
    assert all(len(batch) == size for batch in batches)
    assert seen.keys() == set(range(len(LENGTHS)))


@pytest.mark.parametrize("grouped", [True, False])
def test_all_examples_are_seen_equally_often(grouped):
    """Whenever a batch ends with an epoch."""
    seen = Counter(i for batch in take(103, grouped=grouped) for i in batch)
    assert seen == dict.fromkeys(range(103), 4)


@pytest.mark.parametrize("grouped", [True, False])
def test_order_is_deterministic_and_can_be_resumed_anywhere(grouped):
    batches = take(60, grouped=grouped)
    assert batches == take(60, grouped=grouped)
    assert batches != take(60, grouped=grouped, seed=1)
    for start in (1, 15, 16, 17, 25, 26, 40):
        assert take(60 - start, start=start, grouped=grouped) == batches[start:]


def test_rounds_take_the_next_examples():
    """In one random order until all are taken, then in another one; without a limit, all in their order."""
    rounds = [indices_of_round(10, 4, 7, number) for number in range(1, 6)]
    assert all(len(one) == 4 for one in rounds)
    stream = [index for one in rounds for index in one]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10)) and stream[:10] != stream[10:]
    assert indices_of_round(10, 4, 8, 1) != rounds[0] == indices_of_round(10, 4, 7, 1)
    assert indices_of_round(10, 0, 7, 2) == indices_of_round(10, 10, 7, 2) == list(range(10))


def test_epochs_differ():
    stream = [i for batch in take(52, grouped=False) for i in batch]
    assert stream[:103] != stream[103:206]


def test_grouped_batches_hold_similar_lengths():
    for start in (0, 25, 75):  # in three epochs
        grouped, plain = (
            np.mean([np.ptp([LENGTHS[i] for i in batch]) for batch in take(25, start, grouped)])
            for grouped in (True, False)
        )
        assert grouped < 0.4 * plain


def test_grouped_batches_are_not_sorted_by_length():
    first = [max(LENGTHS[i] for i in batch) for batch in take(12)]
    assert first != sorted(first) and first != sorted(first, reverse=True)


@pytest.mark.parametrize("rows", [1, 5, 24, 31])
@pytest.mark.parametrize("micro_batch, ranks", [(1, 1), (2, 4), (3, 2), (4, 8)])
def test_deal_gives_each_row_to_one_rank_and_each_rank_the_same_number_of_rounds(rows, micro_batch, ranks):
    parts = [deal(range(rows), LENGTHS, micro_batch, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(chunk) <= micro_batch for part in parts for chunk in part)
    assert sorted(i for part in parts for chunk in part for i in chunk) == list(range(rows))


def test_deal_groups_rows_of_similar_length():
    parts = [deal(range(24), LENGTHS, 3, rank, 2) for rank in range(2)]
    chunks = sorted((sorted(LENGTHS[i] for i in chunk) for part in parts for chunk in part), key=min)
    assert [length for chunk in chunks for length in chunk] == sorted(LENGTHS[:24])
    assert all(len(chunk) == 3 for chunk in chunks)


@pytest.mark.end_to_end
def test_little_padding_on_real_conversations(shared):
    encoder = SegmentEncoder(load_tokenizer(str(shared / "tokenizers/smollm2")))
    options = SFTOptions(eval_fraction=0.0, max_length=1024)
    to_example = partial(
        tokenize_demonstration,
        encoder=encoder,
        max_length=1024,
        overlong="truncate_prompt",
        loss_on="response",
    )
    data = [str(shared / "data/oasst/demonstrations.jsonl")]
    train, _ = load_examples(data, options, Demonstration, to_example)
    lengths = train.notes("length")
    assert 0 < padding_share(lengths, options) < 0.05


def test_padding_share():
    """Of [1, 2] and [3, 4] together, two positions of twelve; of all four at once, six of sixteen."""
    for size, share in ((1, 0), (2, 2 / 12), (4, 6 / 16)):
        options = SFTOptions(global_batch_size=4, micro_batch_size=size)
        assert padding_share([4, 1, 3, 2], options) == pytest.approx(share)


def test_pad_rows():
    assert pad_rows([[1, 2], [], [3, 4, 5]], 9).tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]]
    assert pad_rows([[True], [False, True]], False).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("steps", [0, 1, 5, 24, 25, 60])
def test_the_examples_of_the_first_steps_are_those_of_their_batches(steps):
    lengths = np.random.default_rng(0).integers(1, 50, size=100).tolist()
    batches = islice(batch_order(lengths, 4, 7, 0, grouped=True), steps)
    assert examples_of_steps(lengths, 4, 7, steps) == sorted({i for batch in batches for i in batch})
