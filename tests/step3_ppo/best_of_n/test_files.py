"""samples.jsonl after a stop: truncated to complete chunks; invalid lines are refused."""

import json

import pytest

from common.runtime.options import UserError
from step3_ppo.best_of_n.files import truncate_to_chunks

SAMPLE = {"group": 0, "prompt": "p", "completion": "c", "length": 2, "ended": True, "score": 0.5}


def test_file_is_truncated_to_complete_chunks(tmp_path):
    path = tmp_path / "samples.jsonl"
    line = json.dumps(SAMPLE) + "\n"
    path.write_text(line * 5 + line[:20])
    assert truncate_to_chunks(path, chunk=2, total=8) == 4 and path.read_text() == line * 4
    assert truncate_to_chunks(path, chunk=3, total=4) == 4, "the last chunk may be shorter"


@pytest.mark.parametrize(
    "line",
    [b"\x00\x00", b"[1]", b"null", b"{}", b"\xff", b"[" * 99_999]
    + [json.dumps(SAMPLE | bad).encode() for bad in ({"score": None}, {"ended": "yes"}, {"completion": 3})],
)
def test_invalid_line_is_refused_and_file_unchanged(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    content = json.dumps(SAMPLE).encode() + b"\n" + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples.jsonl:2: not a sample of this command"):
        truncate_to_chunks(path, chunk=1, total=8)
    assert path.read_bytes() == content
