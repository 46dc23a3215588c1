"""What every request passes first: key, size, time, and whether the server takes any.

Input: a request as ASGI hands it over. Output: the application's answer, or a refusal.
Invariants: keys are compared in constant time; a body is in memory only within the limit; requests
are counted from here on until their answer has ended.
"""

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from ..errors import ConfigError
from ..options import ServeConfig
from .refusals import Refused, deadline_passed
from .service import Service

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

KEY, ADMIN_KEY = "BIOSCAN_API_KEY", "BIOSCAN_ADMIN_KEY"
_LOCAL = ("127.0.0.1", "localhost", "::1")
_ENDPOINTS = ("embeddings", "classify", "search", "models", "jobs")


def read_keys(name: str) -> tuple[bytes, ...]:
    """Digests of the keys in an environment variable, where several stand between commas."""
    words = [word.strip() for word in os.environ.get(name, "").split(",")]
    return tuple(_digest(word) for word in words if word)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_one_of(key: str, known: tuple[bytes, ...]) -> bool:
    """Compare with every key, each in constant time."""
    ours = _digest(key)
    return sum(hmac.compare_digest(ours, other) for other in known) > 0


def is_local(host: str) -> bool:
    """True for names of this machine that others cannot reach."""
    return host in _LOCAL or host.startswith("127.")


def check_address(config: ServeConfig) -> None:
    """Refuse to listen beyond this machine without a key."""
    if not read_keys(KEY) and not is_local(config.host) and not config.anonymous:
        raise ConfigError(
            f"host {config.host} can be reached from other machines and no {KEY} is set; set it, "
            "or allow everyone with --anonymous"
        )


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: Any, service: Service):
        """Read the keys from the environment."""
        self._app, self._service = app, service
        self._keys, self._admin_keys = read_keys(KEY), read_keys(ADMIN_KEY)
        self._most_bytes = service.config.max_body_mb * 1_000_000

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        path: str = scope["path"]
        is_work = path.startswith("/v1/")
        status = 499  # unless an answer begins: the client has left

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.is_draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self._service.active += is_work
        try:
            await self._serve(scope, receive, counted, started)
        except Refused as refused:
            await _answer(refused, counted)
        finally:
            self._service.active -= is_work
            endpoint = path.split("/")[2] if is_work else path.strip("/").split("/")[0]
            known = endpoint in (*_ENDPOINTS, "health", "metrics")
            label = endpoint if known else "other"
            metrics = self._service.metrics
            metrics.requests.labels(label, str(status)).inc()
            if is_work:
                metrics.seconds.labels(label).observe(time.monotonic() - started)

    async def _serve(self, scope: Any, receive: Receive, send: Send, started: float) -> None:
        headers = {name: value for name, value in scope["headers"]}
        deadline = started + self._seconds(headers)
        scope.setdefault("state", {})["deadline"] = deadline
        if not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        scope["state"]["is_admin"] = self._check_key(headers)
        self._check_ready()
        if scope["method"] == "POST":
            receive = await self._read(headers, receive, deadline)
        await self._app(scope, receive, send)

    def _seconds(self, headers: MutableMapping[bytes, bytes]) -> float:
        most = self._service.config.timeout_seconds
        text = headers.get(b"x-timeout-seconds")
        if text is None:
            return most
        try:
            asked = float(text)
            if not asked > 0:
                raise ValueError
        except ValueError:
            raise Refused(
                400, "bad_timeout", "x-timeout-seconds must be a number above 0"
            ) from None
        return min(most, asked)

    def _check_key(self, headers: MutableMapping[bytes, bytes]) -> bool:
        """Refuse a request without a key where one is needed; True if it is the administrator's."""
        given = headers.get(b"authorization", b"").decode("latin-1")
        kind, _, key = given.partition(" ")
        key = key.strip() if kind.lower() == "bearer" else ""
        is_admin = _is_one_of(key, self._admin_keys)
        if is_admin or _is_one_of(key, self._keys):
            return is_admin
        if self._keys:
            raise Refused(
                401,
                "invalid_api_key",
                "no valid API key; send it as `Authorization: Bearer KEY`",
            )
        config = self._service.config
        name = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]")
        # A page in a browser can reach this address under a name of its own.
        if is_local(config.host) and not is_local(name):
            raise Refused(403, "wrong_host", "without a key only this machine is served")
        return False

    def _check_ready(self) -> None:
        if self._service.is_draining:
            raise Refused(
                503, "shutting_down", "the server is shutting down", retry_after_seconds=5
            )
        if not self._service.is_loaded:
            raise Refused(
                503,
                "loading",
                "the models are still being loaded; try again in some seconds",
                retry_after_seconds=5,
            )

    async def _read(
        self, headers: MutableMapping[bytes, bytes], receive: Receive, deadline: float
    ) -> Receive:
        """Read the whole body, within the limits of size and time."""
        told = headers.get(b"content-length", b"0")
        if told.isdigit() and int(told) > self._most_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            left = deadline - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except asyncio.TimeoutError:
                raise deadline_passed() from None
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._most_bytes:
                raise self._too_large()
        whole: list[Message] = [
            {"type": "http.request", "body": b"".join(parts), "more_body": False}
        ]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again

    def _too_large(self) -> Refused:
        return Refused(
            413,
            "body_too_large",
            f"the body is larger than {self._service.config.max_body_mb} MB; send fewer sequences "
            "at once",
        )


async def _answer(refused: Refused, send: Send) -> None:
    headers = {"content-type": "application/json", **refused.headers}
    if refused.status in (413, 504):
        headers["connection"] = "close"  # the rest of the body is not read
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    body = orjson.dumps(refused.body)
    encoded.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
