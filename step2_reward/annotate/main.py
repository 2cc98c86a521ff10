"""Annotation: people compare two responses on a local web page; their answers are data for step 2.

    bash launch/annotate.sh --pair_data pairs.jsonl --output annotations.jsonl
    bash launch/annotate.sh --pair_data pairs.jsonl --output annotations.jsonl --agreement

The same command resumes, at the same address.
"""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path

from common.runtime.distributed import log
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import SIGNALS, run_main
from step2_reward.annotate.agreement import format_agreement
from step2_reward.annotate.click_log import Store, check_known, current_answers, log_path, read_clicks
from step2_reward.annotate.options import AnnotateOptions
from step2_reward.pairs import read_pairs

LAST_UNDO = 5.0  # seconds in which a rater can take back the answer to the last pair, with --until_answered
LOOK_INTERVAL = 0.5


def main() -> None:
    # 1. Validate all inputs before serving the page.
    options = parse_options(AnnotateOptions)
    pairs = read_pairs(options.pair_data, options.golden_data, options.skip_bad_records)
    if options.agreement:
        file = log_path(Path(options.output))
        if not file.exists():
            raise UserError(f"--output {options.output}: its click log {file} is missing")
        clicks = read_clicks(file)
        check_known(clicks, {pair.id: pair for pair in pairs}, Path(options.output))
        log(format_agreement(current_answers(clicks), pairs))
        return
    listener = listen(options.host, options.port)
    store = Store(options.output, pairs)
    if options.until_answered and not store.unanswered():
        log(f"{store.path}: all pairs are answered: {counts(store)}")
        return

    # 2. Serve the page until a signal. The click log is always complete; only F.jsonl is written at the end.
    from waitress import create_server

    from step2_reward.annotate.server import make_app

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a short queue is normal
    token = load_token(Path(options.output).with_suffix(".token"))
    server = create_server(make_app(store, pairs, options.seed, token), sockets=[listener], ident=None)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    golden = sum(bool(pair.answer) for pair in pairs)
    log(f"{len(pairs) - golden} pairs and {golden} golden questions; answers so far: {counts(store)}")
    log(f"http://{address(listener)}/?token={token}\nCtrl-C stops the page; run the same command to resume")
    threading.Thread(target=store.write_often, daemon=True).start()
    if options.until_answered:
        threading.Thread(target=end_when_answered, args=(store,), daemon=True).start()
    server.run()
    store.write_preferences()
    log(f"{store.path}: answers so far: {counts(store)}")


def end_when_answered(store: Store) -> None:
    """End the page like Ctrl-C when all pairs have been answered for LAST_UNDO seconds."""
    answered_for = 0.0
    while answered_for < LAST_UNDO:
        time.sleep(LOOK_INTERVAL)
        answered_for = 0.0 if store.unanswered() else answered_for + LOOK_INTERVAL
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of the page. Raises UserError when it cannot be opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except Exception as error:  # noqa: BLE001 - a host name may be anything
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", error)
        raise UserError(f"--host {host} --port {port}: {reason}; choose another (--port 0: any)") from None


def address(listener: socket.socket) -> str:
    """Format the page's address for a browser; the machine's name when it listens at all addresses."""
    host, port = listener.getsockname()[:2]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{name}:{port}"


def load_token(path: Path) -> str:
    """Load the token from the file, so that open pages work after a restart; create it if missing."""
    try:
        path.touch(mode=0o600)
        if not (token := path.read_text().strip()):
            token = secrets.token_urlsafe(24)
            path.write_text(f"{token}\n")
        return token
    except UnicodeDecodeError:
        raise UserError(f"{path}: holds no token; delete it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def counts(store: Store) -> str:
    """Format the number of answers per rater."""
    return ", ".join(f"{rater} {len(clicks)}" for rater, clicks in store.answers.items() if clicks) or "none"


if __name__ == "__main__":
    run_main(main)
