"""The server's process: from options to the last answer.

Input: options. Output: an exit status. Invariants: SIGTERM and Ctrl-C let what was accepted finish
and refuse the rest; a second signal ends at once; a model that cannot be loaded ends the server
with its error.
"""

import logging
import socket
import sys
import threading
import time
from types import FrameType

import uvicorn

from ..errors import ConfigError
from ..options import ServeConfig
from .app import make_app
from .guard import check_address
from .service import Service

log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005
_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, so that they close it
_LAST_SECONDS = 5  # for answers under way once the time to drain is over


class Server(uvicorn.Server):
    """Uvicorn that drains before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        self._drained_by = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting; at the second signal, stop."""
        if self.service.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._drained_by = time.monotonic() + self.service.config.drain_seconds
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: True when it is time to end."""
        is_over = self.service.failure is not None
        if self.service.is_draining:
            is_late = time.monotonic() > self._drained_by
            is_over = is_over or is_late or not self.service.active
        return await super().on_tick(counter) or is_over


def serve(config: ServeConfig) -> int:
    """Serve until a signal; returns the exit status.

    Raises:
        ConfigError: no address to listen at, or no key where one is needed.
        BioscanError: a model cannot be loaded.
    """
    check_address(config)
    listening = _bind(config)
    # What a thread waits for the interpreter, at most; the device's gives it up at every operation.
    sys.setswitchinterval(_SWITCH_SECONDS)
    service = Service(config)
    options = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        lifespan="off",
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    port = listening.getsockname()[1]
    log.info(
        "listening at http://%s:%d (pages: /docs, /metrics); answers come once the models are "
        "loaded",
        config.host,
        port,
    )
    loading = threading.Thread(target=service.load, name="loading", daemon=True)
    loading.start()
    Server(options, service).run(sockets=[listening])
    service.close()
    if service.failure is not None:
        raise service.failure
    return 0


def _bind(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"host {config.host}, port {config.port}: cannot listen there ({error.strerror}); "
            "choose another --port or --host"
        ) from error
    return listening
