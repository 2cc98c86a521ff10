"""The web server of the annotation page: access control, state of the page, and answers.

A token in the address grants access. Other sites in a rater's browser do not know the token, and requests
under a foreign host name are refused.
"""

import contextlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from flask import Flask, Response, abort, request
from werkzeug.exceptions import HTTPException

from common.data.records import fraction
from step2_reward.annotate.click_log import STRENGTHS, Store
from step2_reward.pairs import Pair, Text, turns

PAGE = Path(__file__).with_name("page")
LONGEST_NAME = 40
LARGEST_REQUEST = 1 << 14  # bytes
SIDES = ("left", "right", "tie", "skip")
CHOICE_NAMES = {"left": "A is better", "right": "B is better", "tie": "a tie", "skip": "skipped"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
State = dict[str, Any]  # JSON reply to the page


class Progress(NamedTuple):
    """The pairs in the order of the page, and the answers so far."""

    store: Store
    pairs: Sequence[Pair]
    seed: int

    def left_of(self, pair: Pair, rater: str) -> str:
        """Return the response on the left, A or B."""
        return "A" if fraction([pair.id, rater], f"left {self.seed}") < 0.5 else "B"

    def state(self, rater: str, notice: str = "", pair: Pair | None = None) -> State:
        """Return a rater's progress, with this pair or else the first unanswered one."""
        answered = self.store.answers.get(rater, {})
        pair = pair or next((pair for pair in self.pairs if pair.id not in answered), None)
        skipped = sum(click.choice == "skip" for click in list(answered.values()))
        facts = {"rater": rater, "done": len(answered), "total": len(self.pairs), "skipped": skipped}
        return {**facts, "notice": notice, "pair": pair and pair_view(pair, self.left_of(pair, rater))}


def make_app(store: Store, pairs: Sequence[Pair], seed: int, token: str) -> Flask:
    """Make the WSGI application of the page.

    seed: of the order of pairs, the same for all raters, and of the sides, drawn for each rater.
    """
    app = Flask(__name__, static_folder=PAGE, static_url_path="/static")
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_REQUEST
    by_id = {pair.id: pair for pair in pairs}
    progress = Progress(store, sorted(pairs, key=lambda pair: fraction(pair.id, f"order {seed}")), seed)
    _guard(app, store, token)

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.post("/next")
    def proceed() -> State:
        return progress.state(rater_name())

    @app.post("/answer")
    def answer() -> State:
        rater, side, strength = rater_name(), field("side"), request.json.get("strength")
        if field("pair") not in by_id or side not in SIDES or strength not in (None, *STRENGTHS):
            abort(400, "No such pair, side or strength; reload the page")
        pair = by_id[field("pair")]
        left = progress.left_of(pair, rater)
        choice = {"left": left, "right": "B" if left == "A" else "A"}.get(side, side)
        before = store.answers.get(rater, {}).get(pair.id)
        store.add(field("click"), rater, pair.id, choice, strength if choice in "AB" else None, left)
        again = before and before.id != field("click")
        note = ", replacing your earlier answer to this pair" if again else ""
        return progress.state(rater, f"Saved: {CHOICE_NAMES[side]}{note}")

    @app.post("/undo")
    def undo() -> State:
        rater = rater_name()
        undone = store.undo(field("click"), rater)
        if undone is None:
            return progress.state(rater, "Nothing to undo")
        side = {undone.left: "left", "tie": "tie", "skip": "skip"}.get(undone.choice, "right")
        return progress.state(rater, f"Undone: {CHOICE_NAMES[side]}", by_id[undone.pair])

    return app


def _guard(app: Flask, store: Store, token: str) -> None:
    """Refuse requests without the token or by another host name; send errors as one line of text."""

    @app.before_request
    def check() -> None:
        if not is_own_host(request.host):
            abort(403, f"{request.host} is not a name of this machine; open the page by its IP address")
        if request.endpoint != "static":
            sent = request.args.get("token", "") if request.method == "GET" else field("token")
            if not hmac.compare_digest(sent.encode(errors="replace"), token.encode()):
                abort(403, "The address has no valid token; open the address that was printed")

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def explain(error: HTTPException) -> Response:
        return Response(error.description, error.code, mimetype="text/plain")

    @app.errorhandler(OSError)
    def report(error: OSError) -> Response:
        return Response(f"{store.path}: {error.strerror}", 507, mimetype="text/plain")


def field(name: str) -> str:
    """Return a text field of the request. Replies 400 when it is missing."""
    value = request.json.get(name) if isinstance(request.json, dict) else None
    if not isinstance(value, str) or not value:
        abort(400, f"{name!r} is missing")
    return value


def rater_name() -> str:
    """Return the rater's name, normalised in case and spaces."""
    name = " ".join(field("rater").split()).casefold()
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        abort(400, f"A name must have 1 to {LONGEST_NAME} printable characters")
    return name


def pair_view(pair: Pair, left: str) -> dict[str, Any]:
    """Return a pair for the page, without any hint which response is which."""
    right = "B" if left == "A" else "A"
    return {
        "id": pair.id,
        "prompt": _turns(pair.prompt),
        "left": _turns(pair.responses[left]),
        "right": _turns(pair.responses[right]),
        "leftCut": not pair.ended.get(left, True),
        "rightCut": not pair.ended.get(right, True),
    }


def is_own_host(host: str) -> bool:
    """Check that a Host header is an IP address or a name of this machine.

    Other names may belong to a foreign site that resolves them to this machine, so that its scripts count as
    ours (DNS rebinding).
    """
    name = urlsplit(f"//{host}").hostname or ""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in ("localhost", socket.gethostname().lower(), socket.getfqdn().lower())


def _turns(text: Text) -> list[dict[str, str]]:
    return [{"role": role, "text": content} for role, content in turns(text)]
