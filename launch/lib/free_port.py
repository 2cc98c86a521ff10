"""Print a port that nothing uses, for the ranks of a run on one machine to meet at."""

import contextlib
import random
import socket


def free_port() -> int:
    """Below the range from which the kernel takes ports for outgoing connections: one of those, of another
    run's, could get the port in the seconds until the ranks listen on it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


if __name__ == "__main__":
    print(free_port())
