"""The web page: who may ask, what it is told, and how an answer gets to the store.

A token in the address lets a rater in. Whoever cannot read the address can do nothing: other sites that a
rater's browser visits do not know it, and may not claim to be this machine under a name of their own.
"""

import contextlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
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
SAID = {"left": "A is better", "right": "B is better", "tie": "a tie", "skip": "skipped"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
State = dict[str, Any]  # what the page is told


def make_app(store: Store, pairs: Sequence[Pair], seed: int, token: str) -> Flask:
    """The page and what it asks for, as a WSGI application.

    seed: decides the order of the pairs, which is one for all raters, and for each who is on the left.
    """
    app = Flask(__name__, static_folder=PAGE, static_url_path="/static")
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_REQUEST
    order = sorted(pairs, key=lambda pair: fraction(pair.id, f"order {seed}"))
    by_id = {pair.id: pair for pair in pairs}

    def left_of(pair: Pair, rater: str) -> str:
        return "A" if fraction([pair.id, rater], f"left {seed}") < 0.5 else "B"

    def state(rater: str, notice: str = "", pair: Pair | None = None) -> State:
        """Where a rater stands, with this pair or else the first that is not answered."""
        answered = store.answers.get(rater, {})
        pair = pair or next((pair for pair in order if pair.id not in answered), None)
        skipped = sum(click.choice == "skip" for click in list(answered.values()))
        facts = {"rater": rater, "done": len(answered), "total": len(order), "skipped": skipped}
        return {**facts, "notice": notice, "pair": pair and shown(pair, left_of(pair, rater))}

    @app.before_request
    def check() -> None:
        if not is_own_host(request.host):
            abort(403, f"{request.host} is no name of this machine; open the page by the machine's address")
        if request.endpoint != "static":
            given = request.args.get("token", "") if request.method == "GET" else field("token")
            if not hmac.compare_digest(given.encode(errors="replace"), token.encode()):
                abort(403, "The address has no token, or an old one; open the address that was printed")

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

    @app.get("/")
    def page() -> Response:
        return app.send_static_file("index.html")

    @app.post("/next")
    def proceed() -> State:
        return state(rater_name())

    @app.post("/answer")
    def answer() -> State:
        rater, side, strength = rater_name(), field("side"), request.json.get("strength")
        if field("pair") not in by_id or side not in SIDES or strength not in (None, *STRENGTHS):
            abort(400, "No such pair, side or strength; reload the page")
        pair = by_id[field("pair")]
        left = left_of(pair, rater)
        choice = {"left": left, "right": "B" if left == "A" else "A"}.get(side, side)
        before = store.answers.get(rater, {}).get(pair.id)
        store.add(field("click"), rater, pair.id, choice, strength if choice in "AB" else None, left)
        again = before and before.id != field("click")
        instead = ", in place of your earlier answer to the same pair" if again else ""
        return state(rater, f"Saved: {SAID[side]}{instead}")

    @app.post("/undo")
    def undo() -> State:
        rater = rater_name()
        undone = store.undo(field("click"), rater)
        if undone is None:
            return state(rater, "Nothing to undo")
        side = {undone.left: "left", "tie": "tie", "skip": "skip"}.get(undone.choice, "right")
        return state(rater, f"Undone; you had said: {SAID[side]}", by_id[undone.pair])

    return app


def field(name: str) -> str:
    """A text that the page sends. Ends the request when it is not there."""
    value = request.json.get(name) if isinstance(request.json, dict) else None
    if not isinstance(value, str) or not value:
        abort(400, f"{name!r} is missing")
    return value


def rater_name() -> str:
    """The rater's name, in which capitals and spaces make no difference."""
    name = " ".join(field("rater").split()).casefold()
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        abort(400, f"A name has 1 to {LONGEST_NAME} letters")
    return name


def shown(pair: Pair, left: str) -> dict[str, Any]:
    """A pair as the page gets it: texts, and nothing that tells which response is which."""
    right = "B" if left == "A" else "A"
    return {
        "id": pair.id,
        "prompt": _speech(pair.prompt),
        "left": _speech(pair.responses[left]),
        "right": _speech(pair.responses[right]),
        "leftCut": not pair.ended.get(left, True),
        "rightCut": not pair.ended.get(right, True),
    }


def is_own_host(host: str) -> bool:
    """Whether a Host header is an address, or a name that this machine gives itself. Any other name may be
    one that a foreign site has made to point here, so that its scripts count as ours (DNS rebinding).
    """
    name = urlsplit(f"//{host}").hostname or ""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in ("localhost", socket.gethostname().lower(), socket.getfqdn().lower())


def _speech(text: Text) -> list[dict[str, str]]:
    return [{"role": role, "text": said} for role, said in turns(text)]
