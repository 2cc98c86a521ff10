"""Send metrics to the trackers of --report_to, each metric of a step once, also across stops."""

import atexit
import contextlib
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.runtime.damaged_jsonl import read_metrics
from common.runtime.distributed import log
from common.runtime.files import read_json, write_json
from common.runtime.option_checks import resolved
from common.runtime.options import reason
from common.training.trackers import Metrics, Run, open_tracker


class Trackers:
    """The trackers of a run. A resumed run continues its run in each, and sends no metric of a step twice.

    A service that fails is left out until the next start, with a line in the log; it then gets what it lacks
    from metrics.jsonl. OUT/trackers.json holds the id of the run and, by service, the last step of each
    metric.
    """

    def __init__(self, options: Any, start_step: int) -> None:
        """options: of a stage. Each tracker is opened at its first use."""
        self._options, self._start_step = options, start_step
        self._folder = Path(options.output_dir)
        self.names = [name for name in dict.fromkeys(options.report_to) if name != "none"]
        self._trackers: dict[str, Any] = {}
        self._record: dict[str, Any] = {}
        atexit.register(self.close)

    def add(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a step."""
        for name in [*self.names]:
            with self._leaving_out(name, step):
                if name == "tensorboard":  # removes the steps that a resumed run repeats
                    self._tracker(name).add(step, metrics)
                else:
                    self._send(name, step, metrics)

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a Markdown text to TensorBoard."""
        if "tensorboard" in self.names:
            with self._leaving_out("tensorboard", step):
                self._tracker("tensorboard").text(step, tag, text)

    def close(self) -> None:
        for tracker in self._trackers.values():
            with contextlib.suppress(Exception):
                tracker.close()
        self._trackers = {}

    def _send(self, name: str, step: int, metrics: Metrics) -> None:
        """Send the metrics that a service lacks; at its first use, also those of earlier steps."""
        lines = [(step, metrics)]
        if name not in self._trackers:
            earlier, _ = read_metrics(self._folder / "metrics.jsonl")
            lines = [(line.pop("step"), line) for line in earlier if line["step"] <= step] + lines
        tracker = self._tracker(name)
        last_steps = self._record["last_steps"].setdefault(name, {})
        new = []
        for at, values in lines:
            lacking = {
                metric: value
                for metric, value in values.items()
                if value is not None and math.isfinite(value) and last_steps.get(metric, -1) < at
            }
            last_steps |= dict.fromkeys(lacking, at)
            new += [(at, lacking)] * bool(lacking)
        # Recorded first: a run that is killed in between lacks this line there, but never has it twice.
        write_json(self._folder / "trackers.json", self._record)
        for at, values in new:
            tracker.add(at, values)

    def _tracker(self, name: str) -> Any:
        if name not in self._trackers:
            path = self._folder / "trackers.json"
            if not self._record:
                is_known = path.exists()
                self._record = read_json(path) if is_known else {"id": uuid.uuid4().hex[:8], "last_steps": {}}
            config = {key: value for key, value in resolved(self._options).items() if key != "given"}
            title = "-".join(self._folder.resolve().parts[-2:])
            run = Run(self._record["id"], title, self._folder, self._start_step, config)
            self._trackers[name] = open_tracker(name, run)
        return self._trackers[name]

    @contextlib.contextmanager
    def _leaving_out(self, name: str, step: int) -> Iterator[None]:
        """After an error, leave out a tracker."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a service may raise anything, and training must continue
            self.names.remove(name)
            log(
                f"warning: --report_to {name} failed at step {step} and is off until the next start:"
                f" {reason(error)}; metrics.jsonl has all metrics"
            )
