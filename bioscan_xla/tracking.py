"""Weights & Biases, on request. Guaranteed: a tracker that fails never stops the work."""

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)


class Tracker:
    """Sends figures to a Weights & Biases run; after a failure it warns once and stays silent."""

    def __init__(self, enabled: bool, project: str, config: Mapping[str, Any]):
        """Start a run; the key comes from the environment (WANDB_API_KEY) and is never logged."""
        self._run: Any = None
        if enabled:
            self._guard(self._start, project, config)

    def _start(self, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project, config=dict(config), settings=wandb.Settings(silent=True)
        )

    def log(self, figures: Mapping[str, Any], vector_norms: Any = None) -> None:
        """Send figures, and the histogram of some vector norms."""
        if self._run is not None:
            self._guard(self._send, figures, vector_norms)

    def _send(self, figures: Mapping[str, Any], vector_norms: Any) -> None:
        import wandb

        figures = dict(figures)
        if vector_norms is not None and len(vector_norms):
            figures["embed/vector_norms"] = wandb.Histogram(vector_norms)
        self._run.log(figures)

    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            self._guard(self._run.finish)
            self._run = None

    def _guard(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # whatever it is, it is not worth a month of compute
            log.warning("Weights & Biases failed and is left out from here on: %s", error)
            self._run = None
