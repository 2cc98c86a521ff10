"""Readers of data files: types, paths, and one-line errors for damaged files."""

import csv
import datetime
import json
from pathlib import Path

import pytest

from common.data.readers import content_hash, load_hub_dataset, read_source
from common.data.records import BadRecords, parse_object
from common.runtime.options import UserError

WORDS = [
    "None",
    "NA",
    "null",
    "nan",
    "",
    "4",
    "04.50",
    "True",
    "false",
    "2024-01-02",
    "1e5",
    "-",
    "#N/A",
    " x ",
]


def read(path: Path) -> list[dict]:
    return [parse_object(record) for _, _, record in read_source(str(path))]


def write_csv(path: Path, rows: list[list[str]], **how) -> Path:
    with path.open("w", newline="", encoding=how.pop("encoding", "utf-8")) as file:
        csv.writer(file, **how).writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_text_is_never_converted(tmp_path):
    records = [{"prompt": "Q", "answer": word} for word in WORDS if word]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    write_csv(tmp_path / "a.csv", [["prompt", "answer"], *([r["prompt"], r["answer"]] for r in records)])
    write_parquet(tmp_path / "a.parquet", records)
    for kind in ("json", "jsonl", "csv", "parquet"):
        assert read(tmp_path / f"a.{kind}") == records, kind


def test_numbers_and_dates_keep_the_types_of_the_format(tmp_path):
    records = [{"a": 1, "b": 2.5, "c": True, "d": [1, "x"], "e": {"f": [None]}}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert read(tmp_path / "a.json") == records
    day = datetime.datetime(2024, 1, 2)
    assert read(write_parquet(tmp_path / "a.parquet", [{"n": 3, "day": day}])) == [{"n": 3, "day": day}]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_a_null_field_is_an_absent_field(tmp_path, kind):
    rows = [{"prompt": "a", "completion": None, "n": "1"}, {"prompt": None, "completion": "b", "n": "2"}]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, rows)
    elif kind == "csv":
        write_csv(path, [["prompt", "completion", "n"], *([v or "" for v in row.values()] for row in rows)])
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert read(path) == [{"prompt": "a", "n": "1"}, {"completion": "b", "n": "2"}]


def test_nulls_are_removed_from_messages_but_not_from_other_fields(tmp_path):
    turn = {"role": "user", "content": "a", "tool_calls": None, "name": None}
    record = {"messages": [turn, {**turn, "content": [{"type": "text", "text": "b", "image": None}]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps({**record, "answer": {"expected": None}}))
    (record,) = read(tmp_path / "a.jsonl")
    parts = [{"type": "text", "text": "b"}]
    assert record["messages"] == [{"role": "user", "content": "a"}, {"role": "user", "content": parts}]
    assert record["answer"] == {"expected": None}


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
@pytest.mark.parametrize("name", ["run[1]", "a*", "b?", "c{d,e}", "100%"])
def test_a_path_is_never_a_pattern(tmp_path, kind, name):
    """A similarly named file is never read, and not needed."""
    for folder, text in (
        (name, "expected"),
        ("run1", "decoy"),
        ("ab", "decoy"),
        ("bc", "decoy"),
        ("cd", "decoy"),
    ):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"d.{kind}"
        if kind == "json":
            path.write_text(json.dumps([{"prompt": text}]))
        elif kind == "csv":
            write_csv(path, [["prompt"], [text]])
        else:
            write_parquet(path, [{"prompt": text}])
    assert read(tmp_path / name / f"d.{kind}") == [{"prompt": "expected"}]
    assert content_hash(str(tmp_path / name / f"d.{kind}")) != content_hash(
        str(tmp_path / "run1" / f"d.{kind}")
    )


ONE, TWO = {"prompt": "a", "n": 1}, {"prompt": "b\\u00e4", "n": 2}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ONE, TWO]), json.dumps([ONE, TWO], indent=1), f"{json.dumps(ONE)}\n{json.dumps(TWO)}\n",
        f"{json.dumps(ONE, indent=2)}\n{json.dumps(TWO, indent=2)}", f"\ufeff {json.dumps([ONE, TWO])} \r\n",
        json.dumps(ONE) + json.dumps(TWO),
    ],
)  # fmt: skip
def test_json_file_is_a_list_or_a_sequence_of_values(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.json") == [ONE, TWO]


@pytest.mark.parametrize("text", ["", " \n", "[]"])
def test_a_json_file_without_records(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"prompt": "a"}', "a.json: not valid JSON: the list has no end"),
        (b'[{"prompt": "a"}] x', "a.json: not valid JSON: text after the end of the list"),
        (
            b'[{"prompt": "a"},\n {"prompt": ]',
            r"a.json: not valid JSON: Expecting value \(line 2, column 13\)",
        ),
        (b'[{"prompt": "a', r"a.json: not valid JSON: Unterminated string .*\(line 1, column 13\)"),
        (b'[{"a": 1} {"a": 2}]', r"not valid JSON: Expecting one comma .*\(line 1, column 11\)"),
        (b'[{"a": 1},, {"a": 2}]', r"not valid JSON: Expecting value \(line 1, column 11\)"),
        (b'[{"a": 1},\n]', r"not valid JSON: Expecting one comma and another value.*column 10\)"),
        (b'[, {"a": 1}]', r"not valid JSON: Expecting value \(line 1, column 2\)"),
        (b'[{"a": 1}, ', "a.json: not valid JSON: the list has no end"),
        (b"hello", r"a.json: not valid JSON: Expecting value \(line 1, column 1\)"),
        (b"[" * 100_000, "a.json: row 1: maximum recursion depth exceeded"),
        (b'[{"n": ' + b"1" * 5000 + b"}]", "a.json: row 1: a number has thousands of digits"),
        (b'[{"prompt": "\xff"}]', "a.json: not UTF-8 text"),
        ('[{"prompt": "a"}]'.encode("utf-16"), "a.json: not UTF-8 text"),
    ],
)
def test_a_damaged_json_file_is_one_line(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_csv_with_quotes_line_ends_bom_and_large_cells(tmp_path):
    large = "x" * 200_000
    rows = [["prompt", "completion"], ['He said "no",', "two\nlines"], ["", ""], [" a ", large]]
    path = write_csv(tmp_path / "a.csv", rows, encoding="utf-8-sig", lineterminator="\r\n")
    path.write_text(path.read_text(encoding="utf-8") + "\r\n\r\n", newline="", encoding="utf-8")
    assert read(path) == [
        {"prompt": 'He said "no",', "completion": "two\nlines"}, {}, {"prompt": " a ", "completion": large},
    ]  # fmt: skip


def test_column_of_row_numbers_from_pandas_is_dropped(tmp_path):
    assert read(write_csv(tmp_path / "a.csv", [["", "prompt"], ["0", "a"]])) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"prompt;completion\na;b\n", "header: one column, 'prompt;completion'; .* by commas, not by ';'"),
        (b"prompt\tcompletion\na\tb\n", r"header: one column, .* by commas, not by '\\t'"),
        (b"prompt,answer,prompt\na,b,c\n", "header: duplicate column 'prompt'"),
        (b"prompt,,answer\na,b,c\n", "header: column 2 has no name"),
        (b'prompt,answer\na,b\nc,"d\n', "row 2, line 3: unexpected end of data"),
        (b'prompt,answer\na,"b" c\n', "row 1, line 2: ',' expected after '\"'"),
        ("prompt,answer\na,b\n".encode("utf-16"), "header: not UTF-8 text; save the file as UTF-8"),
    ],
)
def test_a_damaged_csv_file_is_one_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "a.csv")
    assert str(error.value).startswith(f"{tmp_path / 'a.csv'}: ") and "\n" not in str(error.value)


def test_a_bad_row_of_csv_is_a_bad_record(tmp_path):
    """Too few or too many cells, or another encoding: the error names the row."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,answer\na,b\nc\nd,e,f\ng,\xe9\nh,i\n")
    bad, records = BadRecords(skip=True), []
    for number, _, record in read_source(str(path)):
        with bad.at(str(path), number):
            records.append(parse_object(record))
    assert records == [{"prompt": "a", "answer": "b"}, {"prompt": "h", "answer": "i"}]
    assert (bad.count, bad.first) == (3, (2, "has 1 cells, but the header has 2 columns"))


def test_share_read_rises_to_one(tmp_path):
    rows = [{"prompt": str(n)} for n in range(5000)]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_csv(tmp_path / "a.csv", [["prompt"], *([row["prompt"]] for row in rows)])
    write_parquet(tmp_path / "a.parquet", rows)
    for kind in ("jsonl", "json", "csv", "parquet"):
        numbers, shares, _ = zip(*read_source(str(tmp_path / f"a.{kind}")), strict=True)
        assert numbers == tuple(range(1, 5001))
        assert list(shares) == sorted(shares) and shares[0] > 0 and 0.99 < shares[-1] <= 1


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"a\.parquet: not readable as Parquet: \S.*") as error:
        read(tmp_path / "a.parquet")
    assert "\n" not in str(error.value)


def test_a_split_of_a_hub_dataset(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if split == "broken":
            raise OSError("the connection was reset\nby somebody")
        return datasets.Dataset.from_list([{"prompt": "a", "n": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    load_hub_dataset.cache_clear()
    assert [parse_object(row) for _, _, row in read_source("me/chat:main:test")] == [{"prompt": "a"}]
    with pytest.raises(UserError, match="me/chat:broken: the connection was reset by somebody$"):
        list(read_source("me/chat:broken"))
    assert asked == [("me/chat", "main", "test"), ("me/chat", None, "broken")]
    load_hub_dataset.cache_clear()
