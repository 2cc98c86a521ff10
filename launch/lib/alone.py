"""Run a module as `python -m` does. A signal during its imports ends it with one line.

python launch/lib/alone.py MODULE OPTIONS
"""

import os
import runpy
import signal
import sys

STOPPED = 75  # as in common/runtime/process.py, which takes seconds to import


def on_signal(*_: object) -> None:
    """Exit at once. Modules with something to save install their own handlers later."""
    os.write(1, b"Stopped; nothing to save. Run the same command to start again.\n")
    os._exit(STOPPED)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, on_signal)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
