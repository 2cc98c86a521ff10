"""TensorBoard, Weights & Biases, MLflow and Trackio, each with `add` and `close`.

A service is set up by its own environment variables. Without them its project is `triptych`, and the files of
Weights & Biases and MLflow are in the output directory.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, assert_never

PROJECT = "triptych"
Metrics = Mapping[str, float]


class Run(NamedTuple):
    """A run, as trackers identify it."""

    id: str
    name: str
    folder: Path
    start_step: int
    config: dict[str, Any]


def open_tracker(name: str, run: Run) -> Any:
    """Open a tracker, which has the methods `add` and `close`."""
    match name:
        case "tensorboard":
            return TensorBoard(run)
        case "wandb":
            return WeightsAndBiases(run)
        case "mlflow":
            return MLflow(run)
        case "trackio":
            return Trackio(run)
        case _:
            assert_never(name)


class TensorBoard:
    """Event files in OUT/tensorboard. An error of the disk loses a step; the next one opens a new file."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._writer: Any = None

    def add(self, step: int, metrics: Metrics) -> None:
        with self._writing() as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        with self._writing() as writer:
            writer.add_text(tag, text, step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        try:
            if self._writer is None:
                # Imported at first use, because it takes a second.
                from torch.utils.tensorboard import SummaryWriter

                folder = str(self._run.folder / "tensorboard")
                self._writer = SummaryWriter(folder, purge_step=self._run.start_step + 1)
            yield self._writer
        except OSError:
            self._writer = None  # its thread has ended


class WeightsAndBiases:
    """A run of Weights & Biases."""

    def __init__(self, run: Run) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run.id, name=run.name, config=run.config,
            dir=os.environ.get("WANDB_DIR", run.folder), resume="allow", allow_val_change=True,
            settings=wandb.Settings(console="off"),  # train.log has the output
        )  # fmt: skip

    def add(self, step: int, metrics: Metrics) -> None:
        # It drops metrics of a step before its last one, such as an evaluation repeated after a stop.
        self._run.log(dict(metrics), step=max(step, self._run.step))

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow."""

    def __init__(self, run: Run) -> None:
        # Otherwise a server that is away would hold up training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        local = (run.folder / "mlruns").resolve().as_uri()
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        earlier = self._client.search_runs([number], f"tags.triptych_id = '{run.id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(number, tags={"triptych_id": run.id}, run_name=run.name)
        self._id = created.info.run_id
        parameters = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(parameters), 100):  # the most that it takes at once
            self._client.log_batch(self._id, params=parameters[first : first + 100])

    def add(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run of Trackio."""

    def __init__(self, run: Run) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=f"{run.name}-{run.id}",
            space_id=os.environ.get("TRACKIO_SPACE_ID"), config=run.config, resume="allow", embed=False,
        )  # fmt: skip

    def add(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
