"""Several servers behind one address, by Ray Serve: each replica is a whole server with its model.

`pip install '.[serve]' 'ray[serve]'`, then from the root of this repository:

    serve run launch.ray_serve:build model=bioscan-small replicas=2

Every option of `python -m bioscan_xla.serve` can be given as NAME=VALUE, and `replicas`, `cpus` and
`gpus` of each. Ray listens at 127.0.0.1:8000; `serve.start(http_options=...)` or a Serve config
changes that. Set BIOSCAN_API_KEY on every machine of the cluster before others reach it. Who
reaches the cluster's own ports runs code on it: leave RAY_AUTH_MODE at token, and the ports closed.

A new model is rolled out by running the command again: Ray starts the new replicas beside the old
ones. Background jobs and the endpoint that loads models belong to one process, and are off here.
"""

import os
from dataclasses import asdict, replace
from typing import Any

from ray import serve

from bioscan_xla.cli import parse
from bioscan_xla.options import ServeConfig
from bioscan_xla.serving.app import make_app
from bioscan_xla.serving.service import Service

_AT_ONCE = 1000  # requests that Ray hands a replica; its own queue counts their tokens


@serve.deployment(max_ongoing_requests=_AT_ONCE, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Replica:
    """One server; ready once its model is loaded and its programs are compiled."""

    def __init__(self, options: dict[str, Any]):
        os.environ.pop("BIOSCAN_ADMIN_KEY", None)  # it would change one replica of several
        self.service = Service(ServeConfig(**options))
        self.service.load()
        if self.service.failure is not None:
            raise self.service.failure

    def __serve_build_asgi_app__(self) -> Any:
        """What answers requests, asked for by Ray after the constructor."""
        return make_app(self.service)

    def check_health(self) -> None:
        """Asked by Ray every few seconds; an error has the replica started anew."""
        if not self.service.device.is_well:
            raise RuntimeError("the device does not answer")


def build(arguments: dict[str, str]) -> serve.Application:
    """The application that `serve run` runs."""
    given = dict(arguments)
    replicas, cpus, gpus = (
        kind(given.pop(name, default))
        for name, kind, default in (("replicas", int, 1), ("cpus", float, 1), ("gpus", float, 0))
    )
    words = [f"--{name}={value}" for name, value in given.items()]
    config = replace(parse(ServeConfig, words, "serve run launch.ray_serve:build"), job_roots=[])
    resources = {"num_cpus": cpus, "num_gpus": gpus}
    ready = Replica.options(num_replicas=replicas, ray_actor_options=resources)
    return ready.bind(asdict(config))
