"""samples.jsonl after a stop: whole chunks are left, and what is no sample is named."""

import json

import pytest

from common.runtime.options import UserError
from step3_ppo.best_of_n.files import whole_samples

SAMPLE = {"group": 0, "prompt": "p", "completion": "c", "length": 2, "ended": True, "score": 0.5}


def test_whole_chunks_are_left(tmp_path):
    path = tmp_path / "samples.jsonl"
    line = json.dumps(SAMPLE) + "\n"
    path.write_text(line * 5 + line[:20])
    assert whole_samples(path, chunk=2, total=8) == 4 and path.read_text() == line * 4
    assert whole_samples(path, chunk=3, total=4) == 4, "the last chunk has fewer"


@pytest.mark.parametrize(
    "line",
    [b"\x00\x00", b"[1]", b"null", b"{}", b"\xff", b"[" * 99_999]
    + [json.dumps(SAMPLE | bad).encode() for bad in ({"score": None}, {"ended": "yes"}, {"completion": 3})],
)
def test_what_is_no_sample_is_named_and_left_alone(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    content = json.dumps(SAMPLE).encode() + b"\n" + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples.jsonl:2: not a sample of this command"):
        whole_samples(path, chunk=1, total=8)
    assert path.read_bytes() == content
