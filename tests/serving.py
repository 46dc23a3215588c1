"""A real server on a loopback port, in this process."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from bioscan_xla.options import ServeConfig
from bioscan_xla.serving.app import make_app
from bioscan_xla.serving.run import Server, _bind
from bioscan_xla.serving.service import Service


class Running:
    """A server, its service and a client for it."""

    def __init__(self, service, port):
        self.service = service
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def post(self, path, **body):
        return self.client.post(f"/v1/{path}", json=body)

    @contextmanager
    def busy_device(self):
        """Nothing is computed inside the block."""
        begun, release = threading.Event(), threading.Event()

        def wait():
            begun.set()
            release.wait(20)

        holder = threading.Thread(target=self.service.queue.call, args=(wait,))
        holder.start()
        begun.wait(20)
        try:
            yield
        finally:
            release.set()
            holder.join()


@contextmanager
def running(**options):
    """Serve with these options until the end of the block."""
    config = ServeConfig(**{"port": 0, "device": "cpu", "dtype": "float32", **options})
    listening = _bind(config)
    service = Service(config)
    service.load()
    if service.failure is not None:
        service.close()
        raise service.failure
    settings = uvicorn.Config(make_app(service), log_level="warning", lifespan="off")
    server = Server(settings, service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until(lambda: server.started, 60)  # bound is not yet listening
        yield Running(service, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()


def free_port():
    """A port of the loopback address that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def until(condition, seconds=10):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.005)
