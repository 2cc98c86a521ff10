"""Print a free port for the ranks of a run on one machine."""

import contextlib
import random
import socket


def free_port() -> int:
    """A free port below the range of outgoing connections: another run could otherwise be given the port
    before the ranks listen on it.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


if __name__ == "__main__":
    print(free_port())
