"""The annotation page without a browser: no click is lost, and step 2 reads the result."""

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from common.data.records import read_all
from common.runtime.options import UserError
from common.text.record_formats import normalise_record
from step2_reward.annotate.click_log import Store, current_answers, preference_records, read_clicks
from step2_reward.annotate.main import load_token
from step2_reward.annotate.server import is_own_host, make_app
from step2_reward.data import tokenize_preference
from step2_reward.direct.data import tokenize_paired
from step2_reward.pairs import read_pairs, to_pair
from tests.conftest import REPOSITORY
from tests.end_to_end.test_bad_input import check_refusal
from tests.word_encoder import EOS, WordEncoder

TOKEN = "a-token"
PAIR = {"prompt": "Say hello!", "response_a": "Hello, hello!", "response_b": "No."}


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def make_pairs(path: Path, count: int) -> Path:
    """Write pairs; the good response is A in every other one."""
    sides = [{"response_a": f"good {n}", "response_b": f"bad {n}"} for n in range(count)]
    for n in range(1, count, 2):
        sides[n] = {"response_a": f"bad {n}", "response_b": f"good {n}"}
    return write(path, [{"prompt": f"prompt {n}", **side} for n, side in enumerate(sides)])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Served:
    """The page in a separate process that can be killed and restarted at the same address."""

    def __init__(self, pairs: Path, output: Path, *words: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        files = ["--pair_data", str(pairs), "--output", str(output), "--port", port]
        self._command = [sys.executable, "-m", "step2_reward.annotate.main", *files, *words]
        self.start()

    def start(self, expected: str = "http") -> None:
        """Start the command, up to a line that contains `expected`: the address of the page."""
        self._process = subprocess.Popen(self._command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        lines = []
        while not lines or expected not in lines[-1]:
            lines.append(self._process.stdout.readline())
            assert lines[-1], lines
        self.address = lines[-1].strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> tuple[int, str]:
        """Stop the page like Ctrl-C; returns the exit code and the last lines."""
        self._process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for its end; returns the same."""
        output, _ = self._process.communicate(timeout=30)
        return self._process.returncode, output


@contextlib.contextmanager
def serve(pairs: Path, output: Path, *words: str) -> Iterator[Served]:
    served = Served(pairs, output, *words)
    try:
        yield served
    finally:
        served.kill()


class Rater:
    """Requests of the page: retries each until it is answered."""

    def __init__(self, address: str, name: str) -> None:
        self._base, _, self._token = address.partition("?token=")
        self._name = name
        self.clicks: list[tuple[str, str, str]] = []  # confirmed clicks: id, prompt, good or bad

    def post(self, action: str, **fields: object) -> dict:
        body = json.dumps({"token": self._token, "rater": self._name, **fields}).encode()
        headers = {"Content-Type": "application/json"}
        while True:
            try:
                request = urllib.request.Request(f"{self._base}{action}", body, headers)
                with urllib.request.urlopen(request, timeout=10) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                raise AssertionError(error.read()) from None
            except (OSError, http.client.HTTPException):  # the server is down
                time.sleep(0.05)

    def work(self, wanted: str) -> None:
        """Answer every pair with the response that starts with `wanted`."""
        state = self.post("next")
        while pair := state["pair"]:
            side = "left" if pair["left"][0]["text"].startswith(wanted) else "right"
            name = f"{self._name}-{len(self.clicks)}"
            state = self.post("answer", click=name, pair=pair["id"], side=side, strength=2)
            self.clicks.append((name, pair["prompt"][0]["text"], wanted))
            assert state["done"] == len(self.clicks)


@pytest.mark.end_to_end
def test_two_raters_and_two_kills_lose_no_click(tmp_path: Path) -> None:
    """1,000 clicks with kill -9 in between: each is logged once, and the file for step 2 matches."""
    pairs, output = make_pairs(tmp_path / "pairs.jsonl", 500), tmp_path / "out.jsonl"
    with serve(pairs, output) as served:
        raters = {name: Rater(served.address, name) for name in ("ada", "bob")}
        tasks = [
            threading.Thread(target=raters[name].work, args=(wanted,), daemon=True)
            for name, wanted in (("ada", "good"), ("bob", "bad"))
        ]
        for task in tasks:
            task.start()
        for stop_at in (150, 700):
            while sum(len(rater.clicks) for rater in raters.values()) < stop_at:
                assert all(task.is_alive() for task in tasks)
                time.sleep(0.001)
            served.kill()
            with output.with_suffix(".clicks.jsonl").open("a") as log:
                log.write('{"id": "torn')  # like a crash within a write
            served.start()
        for task in tasks:
            task.join(timeout=120)
            assert not task.is_alive()
        code, last_lines = served.stop()
    assert code == 0 and "ada 500" in last_lines and "bob 500" in last_lines
    clicks = read(output.with_suffix(".clicks.jsonl"))
    confirmed = [name for rater in raters.values() for name, _, _ in rater.clicks]
    assert len(confirmed) == 1000
    assert sorted(click["id"] for click in clicks) == sorted(confirmed)
    by_prompt = {record["prompt"]: record for record in read(output)}
    for name, rater in raters.items():
        for _, prompt, wanted in rater.clicks:
            record = by_prompt[prompt]
            vote = record["votes"][record["raters"].index(name)]
            assert record[f"response_{vote.lower()}"].startswith(wanted)


@pytest.mark.end_to_end
def test_the_page_ends_when_all_pairs_are_answered(tmp_path: Path) -> None:
    """Then the same command does not serve it again."""
    pairs, output = make_pairs(tmp_path / "pairs.jsonl", 2), tmp_path / "out.jsonl"
    with serve(pairs, output, "--until_answered") as served:
        Rater(served.address, "ada").work("good")
        code, last_lines = served.wait()
    assert code == 0 and "answers so far: ada 2" in last_lines and len(read(output)) == 2
    served.start("out.jsonl: all pairs are answered: ada 2")
    assert served.wait() == (0, "")


def test_which_pairs_are_unanswered(tmp_path: Path) -> None:
    """A skip is an answer, an undone one is none, one rater is enough, and golden questions do not count."""
    records = [{**PAIR, "prompt": f"prompt {n}"} for n in range(2)]
    store = open_store(tmp_path, [*records, {**PAIR, "preference": "A"}])
    first, second = (to_pair(record).id for record in records)
    assert store.unanswered() == 2
    store.add("1", "ada", first, "skip", None, "A")
    assert store.unanswered() == 1
    store.add("2", "bob", second, "tie", None, "A")
    assert store.unanswered() == 0
    store.undo("3", "bob")
    assert store.unanswered() == 1


# --- data for step 2 ----------------------------------------------------------------------------------------


def open_store(folder: Path, records: Sequence[dict] = (PAIR,)) -> Store:
    pairs = read_pairs([str(write(folder / "pairs.jsonl", records))], [], False)
    return Store(str(folder / "out.jsonl"), pairs)


def test_output_is_data_for_step_2(tmp_path: Path) -> None:
    """Step 2 reads votes, ties and margins; skips and undone answers are absent."""
    records = [{**PAIR, "prompt": f"prompt {n}", "id": n, "margin": 9} for n in range(6)]
    store = open_store(tmp_path, records)
    names = [to_pair(record).id for record in records]
    answers = {
        "ada": [("A", 3), ("B", 1), ("A", 2), ("skip", None), ("A", None), ("tie", None)],
        "bob": [("A", None), ("B", 3), ("B", 2), ("skip", None), ("A", 2), ("tie", None)],
        "eve": [("B", 1), ("tie", None), ("tie", None), ("B", 3), ("A", 1), ("A", 3)],
    }
    for rater, choices in answers.items():
        for name, (choice, strength) in zip(names, choices, strict=True):
            store.add(f"{rater} {name}", rater, name, choice, strength, "A")
    assert store.undo("undo", "eve").choice == "A"  # the answer to the last pair
    store.write_preferences()
    parsed, _ = read_all([str(tmp_path / "out.jsonl")], normalise_record)
    assert [record["id"] for record in parsed] == list(range(6))
    assert [record["votes"] for record in parsed] == [
        ["A", "A", "B"], ["B", "B", "tie"], ["A", "B", "tie"], ["B"], ["A", "A", "A"], ["tie", "tie"],
    ]  # fmt: skip
    assert [record["raters"] for record in parsed][3:] == [["eve"], ["ada", "bob", "eve"], ["ada", "bob"]]
    rows = [tokenize_preference(record, WordEncoder(), 64, "error", use_margin=True)[0] for record in parsed]
    # (3 + 1 - 1) / 3, (1 + 3) / 3, a tie, 3 / 1, (1 + 2 + 1) / 3, no strengths
    expected = [1, 4 / 3, 0, 3, 4 / 3, 0]
    assert [row.margin for row in rows] == pytest.approx(expected, abs=1e-4)
    assert [row.ranks for row in rows] == [[0, 1], [0, 1], [0, 0], [0, 1], [0, 1], [0, 0]]
    assert [record["chosen"] for record in parsed][:2] == [PAIR["response_a"], PAIR["response_b"]]


def test_a_truncated_response_stays_marked(tmp_path: Path) -> None:
    """On the page, in the file, and for direct optimisation, which adds no EOS to it."""
    store = open_store(tmp_path, [{**PAIR, "response_a_ended": False, "response_b_ended": True}])
    client = Client(store)
    pair = client.post("next").json["pair"]
    cut = "left" if pair["left"][0]["text"] == PAIR["response_a"] else "right"
    assert [side for side in ("left", "right") if pair[f"{side}Cut"]] == [cut]
    for vote, names in (("A", ["chosen", "rejected"]), ("B", ["rejected", "chosen"])):
        store.add(vote, "ada", pair["id"], vote, None, "A")
        store.write_preferences()
        (record,), _ = read_all([str(tmp_path / "out.jsonl")], normalise_record)
        assert record["response_a_ended"] is False and record["response_b_ended"] is True
        assert [record[f"{name}_ended"] for name in names] == [False, True]
        row, _ = tokenize_paired(record, WordEncoder(), 64, "error")
        ends = [dialogue.ids[-1] == EOS for dialogue in row.dialogues]
        assert ends == ([False, True] if vote == "A" else [True, False])


def test_answers_are_restored_from_the_log(tmp_path: Path) -> None:
    records = [{**PAIR, "prompt": f"prompt {n}"} for n in range(3)]
    store = open_store(tmp_path, records)
    first, second, _ = names = [to_pair(record).id for record in records]
    for number, name in enumerate(names):
        store.add(f"c{number}", "ada", name, "A", None, "B")
    store.add("c1", "ada", second, "B", None, "B")  # a retry counts once, unchanged
    store.add("c3", "ada", first, "B", None, "A")  # another tab replaces the first answer
    assert store.undo("c4", "ada").pair == first  # the newest
    assert store.undo("c4", "ada") is None  # a retry
    clicks = read_clicks(tmp_path / "out.clicks.jsonl")
    assert [click.choice for click in clicks] == ["A", "A", "A", "B", "undo"]
    assert current_answers(clicks) == store.answers
    assert [click.id for click in store.answers["ada"].values()] == ["c1", "c2"]
    pairs = read_pairs([str(tmp_path / "pairs.jsonl")], [], False)
    assert [record["prompt"] for record in preference_records(pairs, store.answers)] == [
        "prompt 1",
        "prompt 2",
    ]


def test_a_click_is_not_counted_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    client = Client(store)
    pair = client.post("next").json["pair"]["id"]

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = client.post("answer", click="c", pair=pair, side="left")
    assert reply.status_code == 507 and "No space left" in reply.text
    assert (tmp_path / "out.clicks.jsonl").read_bytes() == b"" and not store.answers
    assert client.post("answer", click="c", pair=pair, side="left").json["done"] == 1


def test_golden_questions_are_asked_but_not_written(tmp_path: Path) -> None:
    golden = [
        {**PAIR, "preference": "B"},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {**PAIR, "prompt": "q", "votes": ["tie", "A", "tie"]},
        {"prompt": "r", "responses": ["worse", "best"], "ranks": [2, 1]},
    ]
    golden_file = write(tmp_path / "golden.jsonl", golden)
    pair_file = write(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, "prompt": "new"}])
    pairs = read_pairs([str(pair_file)], [str(golden_file)], False)
    assert [pair.answer for pair in pairs] == ["", "B", "A", "tie", "B"]  # PAIR's answer is known: golden
    store = Store(str(tmp_path / "out.jsonl"), pairs)
    for pair in pairs:
        store.add(pair.id, "ada", pair.id, "A", None, "A")
    store.write_preferences()
    assert [record["prompt"] for record in read(tmp_path / "out.jsonl")] == ["new"]


# --- the page -----------------------------------------------------------------------------------------------


class Client:
    """Requests of a rater's browser."""

    def __init__(self, store: Store, seed: int = 0) -> None:
        app = make_app(store, list(store._pairs.values()), seed, TOKEN)
        self.client: FlaskClient = app.test_client()

    def post(self, action: str, host: str = "127.0.0.1:8700", **fields: object) -> Any:
        body = {"token": TOKEN, "rater": "ada", **fields}
        return self.client.post(f"/{action}", json=body, headers={"Host": host})


def test_access_control(tmp_path: Path) -> None:
    client = Client(open_store(tmp_path))
    page = client.client.get(f"/?token={TOKEN}")
    assert page.status_code == 200 and b"Which response is better?" in page.data
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert page.headers["Referrer-Policy"] == "no-referrer" and b"Say hello" not in page.data
    for address in ("/", "/?token=", "/?token=other", "/?token=%F0%9F%98%80", "/nowhere"):
        assert client.client.get(address).status_code == 403
    assert client.post("next").status_code == 200
    for token in ("", "other", None, 3, "\ud800"):
        assert client.post("next", token=token).status_code in (400, 403)
    assert client.post("next", host="evil.example").status_code == 403
    form = client.client.post("/next", data={"token": TOKEN, "rater": "ada"})
    text = client.client.post(
        "/next", data=json.dumps({"token": TOKEN, "rater": "a"}), content_type="text/plain"
    )
    assert form.status_code == text.status_code == 415  # forms of another site
    assert client.client.get(f"/next?token={TOKEN}").status_code == 405
    assert client.post("next", more="x" * 20_000).status_code == 413
    for name in ("", "  ", "x" * 41, "a\u202eb", 5):
        assert client.post("next", rater=name).status_code == 400
    assert is_own_host("localhost:1") and is_own_host("[::1]:80") and is_own_host("10.0.0.7")
    assert not is_own_host("localhost.evil.example") and not is_own_host("127.0.0.1.evil.example")


def test_bad_clicks_change_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    client = Client(store)
    good = {"click": "c", "pair": client.post("next").json["pair"]["id"], "side": "left"}
    for bad in ({"pair": "x"}, {"side": "A"}, {"strength": 4}, {"strength": "1"}, {"click": ""}):
        assert client.post("answer", **{**good, **bad}).status_code == 400
    assert not store.answers and not (tmp_path / "out.clicks.jsonl").read_bytes()


def test_sides_are_random_and_reproducible(tmp_path: Path) -> None:
    """Sides depend on rater and seed, the order on the seed; choices refer to the record's responses."""
    pairs = make_pairs(tmp_path / "pairs.jsonl", 100)
    store = Store(str(tmp_path / "out.jsonl"), read_pairs([str(pairs)], [], False))

    number = itertools.count()

    def shown(rater: str, seed: int) -> list[tuple[str, str]]:
        client, prompts_and_lefts = Client(store, seed), []
        state = client.post("next", rater=rater).json
        while pair := state["pair"]:
            prompts_and_lefts.append((pair["prompt"][0]["text"], pair["left"][0]["text"]))
            side = "left" if "good" in pair["left"][0]["text"] else "right"
            click = f"click {next(number)}"
            state = client.post("answer", rater=rater, click=click, pair=pair["id"], side=side).json
        for name in list(store.answers[rater]):
            del store.answers[rater][name]
        return prompts_and_lefts

    ada, bob, other = shown("ada", 0), shown("bob", 0), shown("ada", 1)
    assert shown("ada", 0) == ada
    assert [prompt for prompt, _ in ada] == [prompt for prompt, _ in bob] != [prompt for prompt, _ in other]
    for one, two in ((ada, bob), (sorted(ada), sorted(other))):
        assert 30 < sum(a == b for a, b in zip(one, two, strict=True)) < 70
    assert 30 < sum("good" in left for _, left in ada) < 70
    clicks = read_clicks(tmp_path / "out.clicks.jsonl")
    by_id = {pair.id: pair for pair in store._pairs.values()}
    assert all("good" in by_id[click.pair].responses[click.choice] for click in clicks)
    assert sorted(by_id[c.pair].responses[c.left] for c in clicks[:100]) == sorted(left for _, left in ada)


def test_two_tabs_undo_and_rater_names(tmp_path: Path) -> None:
    store = open_store(tmp_path, [PAIR, {**PAIR, "prompt": "q"}])
    tabs = Client(store), Client(store)
    first = tabs[0].post("next").json["pair"]["id"]
    one = tabs[0].post("answer", click="1", pair=first, side="left", strength=3).json
    assert (one["done"], one["total"], one["notice"]) == (1, 2, "Saved: A is better")
    two = tabs[1].post("answer", rater=" ADA ", click="2", pair=first, side="tie", strength=3).json
    assert two["done"] == 1 and "replacing your earlier answer" in two["notice"] and two["rater"] == "ada"
    assert [(c.choice, c.strength) for c in store.answers["ada"].values()] == [("tie", None)]
    again = tabs[0].post("answer", click="2", pair=first, side="tie").json
    assert "replacing" not in again["notice"] and len(read(tmp_path / "out.clicks.jsonl")) == 2
    back = tabs[0].post("undo", click="3").json
    assert back["done"] == 0 and back["pair"]["id"] == first and "Undone: a tie" in back["notice"]
    assert tabs[0].post("undo", click="4").json["notice"] == "Nothing to undo"
    for number in (5, 6):
        state = tabs[1].post(
            "answer", click=str(number), pair=tabs[1].post("next").json["pair"]["id"], side="skip"
        )
    assert state.json["pair"] is None and (state.json["done"], state.json["skipped"]) == (2, 2)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"prompt": ', "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ({"prompt": "a", "response_a": "b"}, "'response_b' is missing"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a"}, "'response_a' is missing"),
        ({"response_a": "b", "response_b": "bc"}, "'prompt' is missing"),
        ({**PAIR, "prompt": " "}, "'prompt' is empty"),
        ({**PAIR, "response_b": 3}, "'response_b' is int"),
        ({**PAIR, "response_b_ended": "no"}, "'response_b_ended' is 'no'"),
        ({**PAIR, "preference": "C"}, "preference is 'C'"),
        ({**PAIR, "response_a": [{"role": "assistant", "content": "x"}]}, "make both one kind"),
        ({"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 2, 3]}, "has 3 responses"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, line: Any, part: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(PAIR)}\n{text}\n")
    with pytest.raises(UserError, match="pairs.jsonl:2: ") as refusal:
        read_pairs([str(path)], [], False)
    assert part in str(refusal.value) and "\n" not in str(refusal.value)
    assert len(read_pairs([str(path)], [], True)) == 1


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl", [PAIR])
    known = write(tmp_path / "known.jsonl", [{**PAIR, "preference": "A"}])
    empty, foreign = write(tmp_path / "empty.jsonl", []), write(tmp_path / "foreign.jsonl", [PAIR])
    output = tmp_path / "out"
    output.mkdir()

    def refused(data: Path, out: Path | str, *parts: str, more: Sequence[str] = ()) -> None:
        words = ["--pair_data", str(data), "--output", str(out), "--port", "0", *more]
        check_refusal("step2_reward.annotate.main", words, list(parts), tmp_path, output)

    refused(empty, output / "a.jsonl", "empty.jsonl", "no rows left: 0 records read")
    refused(known, output / "a.jsonl", "known.jsonl", "all 1 have an answer")
    refused(pairs, foreign, "foreign.jsonl", "click log foreign.clicks.jsonl is missing")
    refused(pairs, output / "a.json", "must end in .jsonl")
    refused(pairs, output / "no/a.jsonl", "No such file or directory")
    refused(pairs, output / "typo.jsonl", "typo.clicks.jsonl is missing", more=["--agreement"])
    refused(pairs, output / "a.jsonl", "golden question", more=["--golden_data", str(pairs)])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(pairs, output / "a.jsonl", f"--port {port}: Address already in use", more=["--port", port])
    refused(pairs, output / "a.jsonl", "--host 192.0.2.1", more=["--host", "192.0.2.1"])

    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="token: holds no token; delete it"):
        load_token(tmp_path / "token")

    store = Store(str(output / "used.jsonl"), read_pairs([str(pairs)], [], False))
    refused(pairs, output / "used.jsonl", "in use by another page")
    store.add("c", "ada", to_pair(PAIR).id, "A", None, "A")
    store._file.close()
    others = write(tmp_path / "others.jsonl", [{**PAIR, "prompt": "other"}])
    refused(others, output / "used.jsonl", "answers to 1 pairs that are not in --pair_data")
    with (output / "used.clicks.jsonl").open("a") as log:
        log.write('{"id": "x"}\n')
    refused(pairs, output / "used.jsonl", "used.clicks.jsonl:2: not a click")
