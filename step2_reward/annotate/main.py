"""People say which of two responses is better, on a local web page; their answers are data for step 2.

    bash launch/annotate.sh --pair_data pairs.jsonl --output annotations.jsonl
    bash launch/annotate.sh --pair_data pairs.jsonl --output annotations.jsonl --agreement

The same command again goes on where it was stopped, under the same address.
"""

import logging
import os
import secrets
import signal
import socket
import threading
from pathlib import Path

from common.runtime.distributed import log
from common.runtime.option_parser import parse_options
from common.runtime.options import UserError
from common.runtime.process import SIGNALS, run_main
from step2_reward.annotate.agreement import describe
from step2_reward.annotate.click_log import Store, check_known, log_of, read_clicks, standing
from step2_reward.annotate.options import AnnotateOptions
from step2_reward.pairs import read_pairs


def main() -> None:
    # 1. What can be wrong is found before anybody is let in.
    options = parse_options(AnnotateOptions)
    pairs = read_pairs(options.pair_data, options.golden_data, options.skip_bad_records)
    if options.agreement:
        file = log_of(Path(options.output))
        if not file.exists():
            raise UserError(f"--output {options.output}: was not made by this page: {file} is missing")
        clicks = read_clicks(file)
        check_known(clicks, {pair.id: pair for pair in pairs}, Path(options.output))
        log(describe(standing(clicks), pairs))
        return
    listener = listen(options.host, options.port)
    store = Store(options.output, pairs)

    # 2. The page, until a signal comes. There is nothing to save then but what is made of the log.
    from waitress import create_server

    from step2_reward.annotate.server import make_app

    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that a request waits a moment is no news
    token = kept_token(Path(options.output).with_suffix(".token"))
    server = create_server(make_app(store, pairs, options.seed, token), sockets=[listener], ident=None)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    golden = sum(bool(pair.answer) for pair in pairs)
    log(f"{len(pairs) - golden} pairs and {golden} golden questions; answers so far: {counts(store)}")
    log(f"http://{address(listener)}/?token={token}\nCtrl-C ends it; the same command goes on")
    threading.Thread(target=store.write_often, daemon=True).start()
    server.run()
    store.write_preferences()
    log(f"{store.path}: answers so far: {counts(store)}")


def listen(host: str, port: int) -> socket.socket:
    """A socket that raters can connect to. Raises UserError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"--host {host} --port {port}: {reason}; choose another (--port 0: any)") from None


def address(listener: socket.socket) -> str:
    """Where the page is, as a browser wants it: this machine's name when it listens at all addresses."""
    host, port = listener.getsockname()[:2]
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{name}:{port}"


def kept_token(path: Path) -> str:
    """The token in the file, so that open pages work again after a new start; a new one if there is none."""
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
    """How many answers each rater has given."""
    return ", ".join(f"{rater} {len(mine)}" for rater, mine in store.answers.items() if mine) or "none"


if __name__ == "__main__":
    run_main(main)
