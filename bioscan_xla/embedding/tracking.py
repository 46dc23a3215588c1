"""Weights & Biases and TensorBoard, on request.

Input: figures of a run. Output: a run there. Invariants: a failing tracker never stops the work.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Tracker:
    """Sends figures to Weights & Biases or TensorBoard.

    After a failure it warns once and stays silent.
    """

    def __init__(self, name: str, project: str, config: Mapping[str, Any], folder: str):
        """Start a run.

        Args:
            name: none, wandb or tensorboard.
            project: at Weights & Biases; its key comes from the environment (WANDB_API_KEY) and is
                never logged.
            config: options of the run.
            folder: gets TensorBoard's files, in `tensorboard/`.
        """
        self._run: Any = None
        self._name, self._rows = name, 0
        if name == "wandb":
            self._guard(self._start_wandb, project, config)
        elif name == "tensorboard":
            self._guard(self._start_tensorboard, folder, config)

    def _start_wandb(self, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project, config=dict(config), settings=wandb.Settings(silent=True)
        )

    def _start_tensorboard(self, folder: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = SummaryWriter(f"{folder}/tensorboard")
        self._run.add_text("config", json.dumps(dict(config)))

    def log(self, figures: Mapping[str, Any], vector_norms: Any = None) -> None:
        """Send figures, and the histogram of some vector norms."""
        if self._run is not None:
            self._guard(self._send, figures, vector_norms)

    def _send(self, figures: Mapping[str, Any], vector_norms: Any) -> None:
        has_norms = vector_norms is not None and len(vector_norms)
        if self._name == "tensorboard":
            self._rows = int(figures.get("embed/sequences", self._rows))
            for key, value in figures.items():
                self._run.add_scalar(key, value, self._rows)
            if has_norms:
                self._run.add_histogram("embed/vector_norms", vector_norms, self._rows)
            return
        import wandb

        figures = dict(figures)
        if has_norms:
            figures["embed/vector_norms"] = wandb.Histogram(vector_norms)
        self._run.log(figures)

    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            self._guard(self._run.finish if self._name == "wandb" else self._run.close)
            self._run = None

    def _guard(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # no tracker error may end a month of compute
            log.warning("the tracker %s failed and is off from now on: %s", self._name, error)
            self._run = None


class TrainingTracker:
    """Accelerate's own tracker, guarded in the same way."""

    def __init__(self, accelerator: Any, name: str, project: str, config: Mapping, run_id: str):
        """Start or, with the `run_id` of a checkpoint, continue a run."""
        self._accelerator = accelerator if name != "none" else None
        self.is_on = name != "none"
        options = {"wandb": {"id": run_id, "resume": "allow"}} if name == "wandb" else {}
        flat = {key: str(v) if isinstance(v, list | dict) else v for key, v in config.items()}
        flat = {key: value for key, value in flat.items() if value is not None}
        self._guard("init_trackers", project, flat, options)

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Send figures of an update."""
        self._guard("log", dict(figures), step)

    def log_pictures(self, pictures: Mapping[str, Path], step: int) -> None:
        """Send PNG files, those that are there."""
        if self._accelerator is None:
            return
        try:
            from matplotlib.image import imread

            # One picture: (1, height, width, 3), from 0 to 1.
            values = {
                key: imread(path)[None, :, :, :3]
                for key, path in pictures.items()
                if path.is_file()
            }
            for tracker in self._accelerator.trackers:
                form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(values, step, **form)
        except Exception as error:
            self._leave(error)

    def finish(self) -> None:
        """End the run."""
        self._guard("end_training")

    def _guard(self, method: str, *arguments: Any) -> None:
        if self._accelerator is None:
            return
        try:
            getattr(self._accelerator, method)(*arguments)
        except Exception as error:  # no tracker error may end the training
            self._leave(error)

    def _leave(self, error: Exception) -> None:
        log.warning("the tracker failed and is off from now on: %s", error)
        self._accelerator = None
