"""Where a run is.

Input: the outcome so far. Output: a progress bar at a terminal, a log line a minute elsewhere, and
figures for the tracker. Invariants: nothing here changes what the run does.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..encode.packing import Totals
from .threads import Outcome
from .tracking import Tracker

log = logging.getLogger(__name__)

_LOG_SECONDS = 60.0


class Progress:
    """Shows the outcome so far; a context manager that ends with the run."""

    def __init__(
        self,
        utilisation: Callable[[Totals, float], float | None],
        tracker: Tracker,
        total: int | None,
        already: int,
        on_progress: Callable[[int, int | None], None] | None = None,
    ):
        """Begin.

        Args:
            utilisation: of the device, from totals and seconds.
            tracker: gets the figures.
            total: records of the input, where that is known.
            already: of them done by earlier runs.
            on_progress: called with the records that are done and `total`, in place of the bar.
        """
        self._utilisation, self._tracker, self._on_progress = utilisation, tracker, on_progress
        hidden = None if on_progress is None else True
        self._bar = tqdm(total=total, initial=already, unit="seq", disable=hidden, smoothing=0.05)
        self._redirect = logging_redirect_tqdm() if on_progress is None else nullcontext()
        self._started = self._logged = time.monotonic()
        self._shown, self._already = 0, already

    def __enter__(self) -> "Progress":
        self._redirect.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._redirect.__exit__(*error)
        self._bar.close()

    def update(self, outcome: Outcome) -> None:
        """Show where the run is."""
        self._bar.update(outcome.rows_read - self._shown)
        self._shown = outcome.rows_read
        if self._on_progress is not None:
            self._on_progress(outcome.rows_read + self._already, self._bar.total)
        seconds = time.monotonic() - self._started
        last = (
            time.strftime("%H:%M:%S", time.localtime(outcome.last_commit))
            if outcome.last_commit
            else "none yet"
        )
        self._bar.set_postfix_str(f"last commit {last}", refresh=False)
        rate = outcome.totals.sequences / seconds
        if self._bar.disable and time.monotonic() - self._logged >= _LOG_SECONDS:
            self._logged = time.monotonic()
            total = f" of {self._bar.total}" if self._bar.total else ""
            at = outcome.rows_read + self._already
            log.info("%d%s records, %.1f sequences/s, last commit %s", at, total, rate, last)
        utilisation = self._utilisation(outcome.totals, seconds)
        figures = {
            "embed/sequences": outcome.totals.sequences,
            "embed/sequences_per_second": rate,
            "embed/useful_tokens_per_second": outcome.totals.useful_tokens / seconds,
            "embed/useful_token_fraction": outcome.totals.useful_fraction,
            "embed/padding_fraction": 1 - outcome.totals.useful_fraction,
            "embed/errors": outcome.num_rejected,
        }
        if utilisation is not None:
            figures["embed/model_flop_utilisation"] = utilisation
        self._tracker.log(figures, outcome.norms)
