"""The annotation page in headless Chromium: keys and mouse, a kill -9, two tabs, and escaping of texts."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.step2_reward.annotate.test_annotate import make_pairs, read, serve, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium or Chrome to show the page", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive Chromium")

CLICKS = 20  # of each rater
IS_IDLE = "count => document.getElementById('count').textContent.startsWith(count + ' of')"


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def sign_in(page: "playwright.Page", address: str, name: str) -> None:
    page.goto(address)
    page.fill("#name", name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#pair:visible")


def wait_for(page: "playwright.Page", count: int) -> None:
    """Wait until the page shows this count."""
    page.wait_for_function(IS_IDLE, arg=str(count), timeout=60_000)
    page.wait_for_selector("[data-key=u]:enabled")


def test_two_raters_and_a_kill(browser: "playwright.Browser", tmp_path: Path) -> None:
    """One uses keys, one the mouse; the server is killed meanwhile, and open pages reconnect."""
    pairs, output = make_pairs(tmp_path / "pairs.jsonl", CLICKS), tmp_path / "out.jsonl"
    with serve(pairs, output) as served:
        pages = {name: browser.new_context().new_page() for name in ("ada", "bob")}
        for name, page in pages.items():
            sign_in(page, served.address, name)
        for count in range(CLICKS):
            for name, page in pages.items():
                if count == CLICKS // 2 and name == "ada":
                    served.kill()
                wanted = "good" if name == "ada" else "bad"
                key = "a" if page.inner_text("#left").startswith(wanted) else "b"
                if name == "ada":
                    page.keyboard.press("3")
                    page.keyboard.press(key)
                else:
                    page.click(f"[data-key={key}]")
                if count == CLICKS // 2 and name == "ada":
                    page.wait_for_selector("text=Not saved yet")
                    page.keyboard.press("t")  # ignored until the answer is on disk
                    served.start()
                wait_for(page, count + 1)
        assert all(page.is_visible(f"text=All {CLICKS} pairs") for page in pages.values())
        code, _ = served.stop()
    assert code == 0 and len(read(output.with_suffix(".clicks.jsonl"))) == 2 * CLICKS
    records = read(output)
    assert len(records) == CLICKS
    for record in records:
        good, bad = ("A", "B") if record["response_a"].startswith("good") else ("B", "A")
        assert dict(zip(record["raters"], record["votes"], strict=True)) == {"ada": good, "bob": bad}
        assert record["margin"] == 0  # 3 for one, 1 for the other: a tie of votes


def test_tabs_undo_skip_and_a_reload(browser: "playwright.Browser", tmp_path: Path) -> None:
    pairs, output = make_pairs(tmp_path / "pairs.jsonl", 4), tmp_path / "out.jsonl"
    log = output.with_suffix(".clicks.jsonl")
    with serve(pairs, output) as served:
        context = browser.new_context()
        first, second = context.new_page(), context.new_page()
        sign_in(first, served.address, "Ada")
        second.goto(first.url)  # the name is in the address
        second.wait_for_selector("#pair:visible")
        assert first.inner_text("#prompt") == second.inner_text("#prompt")
        first.keyboard.press("ArrowLeft")
        wait_for(first, 1)
        second.keyboard.press("2")
        second.keyboard.press("b")
        wait_for(second, 1)
        assert "replacing your earlier answer" in second.inner_text("#status")
        before = second.inner_text("#prompt")
        second.keyboard.press("s")
        wait_for(second, 2)
        second.keyboard.press("u")
        wait_for(second, 1)
        assert second.inner_text("#prompt") == before and "Undone: skipped" in second.inner_text("#status")
        second.keyboard.press("Control+a")  # not an answer
        second.keyboard.down("t")
        second.keyboard.down("t")  # a held key counts once
        second.keyboard.up("t")
        wait_for(second, 2)
        second.reload()
        wait_for(second, 2)
    clicks = [(click["choice"], click["strength"]) for click in read(log)]
    assert [choice for choice, _ in clicks[2:]] == ["skip", "undo", "tie"]
    assert {clicks[0][0], clicks[1][0]} == {"A", "B"} and [s for _, s in clicks[:2]] == [None, 2]


def test_a_truncated_response_is_marked(browser: "playwright.Browser", tmp_path: Path) -> None:
    """Only on its own side."""
    flags = [{}, {"response_a_ended": False}, {"response_b_ended": False, "response_a_ended": True}]
    records = [
        {"prompt": f"prompt {n}", "response_a": f"first {n}", "response_b": f"second {n}", **one}
        for n, one in enumerate(flags)
    ]
    with serve(write(tmp_path / "pairs.jsonl", records), tmp_path / "out.jsonl") as served:
        page = browser.new_page()
        sign_in(page, served.address, "ada")
        for count in range(len(flags)):
            number = int(page.inner_text("#prompt").split()[-1])
            cut = {1: "first 1", 2: "second 2"}.get(number)
            for side in ("left", "right"):
                assert page.is_visible(f"#{side}-cut") == (page.inner_text(f"#{side}") == cut)
            page.keyboard.press("t")
            wait_for(page, count + 1)


def test_texts_are_escaped_and_the_token_is_required(browser: "playwright.Browser", tmp_path: Path) -> None:
    """Markup in texts has no effect, and the content security policy blocks foreign scripts."""
    attack = (
        "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\"><b>&amp;</b>\n  שלום 🎉"
    )
    turns = [{"role": "user", "content": "<h1>hi</h1>"}, {"role": "assistant", "content": "</div>"}]
    record = {"prompt": [*turns, turns[0]], "response_a": attack, "response_b": "javascript:alert(1)"}
    pairs = write(tmp_path / "pairs.jsonl", [record])
    with serve(pairs, tmp_path / "out.jsonl") as served:
        page = browser.new_page()
        assert page.goto(served.address.partition("?")[0]).status == 403
        assert "open the address that was printed" in page.inner_text("body")
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        sign_in(page, served.address, "<i>ada</i>")
        shown = {page.text_content("#left"), page.text_content("#right")}
        assert shown == {attack, "javascript:alert(1)"}
        assert page.locator("#pair img, #pair script, #pair b, #pair h1").count() == 0
        assert page.text_content("#prompt") == "user<h1>hi</h1>assistant</div>user<h1>hi</h1>"
        assert page.title() == "Which response is better?" and not problems
        page.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'window.x = 1'}))"
        )
        assert page.evaluate("window.x") is None and "Content Security Policy" in problems[0]
        for width, columns in ((1280, 2), (400, 1)):  # side by side, then stacked, never wider than the page
            page.set_viewport_size({"width": width, "height": 800})
            left, right = (page.locator(f"#{side}").bounding_box() for side in ("left", "right"))
            assert (left["y"] == right["y"]) == (columns == 2)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
