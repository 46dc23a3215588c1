"""The HTTP interface.

Input: requests that have passed the guard. Output: JSON, as OpenAI's clients expect it.
Invariants: answers are in the order of the input; every error has OpenAI's shape; no answer or log
line repeats a sequence that was wrong.
"""

import asyncio
import base64
import functools
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from .. import __version__
from ..encode.fingerprint import HINTS
from .answers import DESCRIPTION, describe_name, example_of
from .guard import Guard
from .loading import Wanted
from .refusals import Refused
from .requests import ClassifyRequest, EmbeddingsRequest, JobRequest, LoadRequest, SearchRequest
from .service import Caller, ClientGone, Service
from .versions import Version

_WRITTEN_AT_ONCE = 64  # vectors, before other requests get a turn
_CODES = {404: "not_found", 405: "method_not_allowed"}


def make_app(service: Service) -> Any:
    """The ASGI application of a service."""
    app = FastAPI(title="bioscan_xla", version=__version__, description=DESCRIPTION)
    _add_errors(app)
    _add_work(app, service)
    _add_models(app, service)
    _add_jobs(app, service)
    _add_health(app, service)
    return Guard(app, service)


def answer(content: Any, status: int = 200) -> Response:
    """A JSON answer; arrays are written as numbers."""
    from ..table.neighbours import plain

    body = orjson.dumps(content, default=plain, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type="application/json")


def _caller(request: Request) -> Caller:
    """The client of a request, whose body has been read: what comes next is that it leaves."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return Caller(request.state.deadline, gone)


def _texts(service: Service, given: str | list[str]) -> Sequence[str]:
    texts = [given] if isinstance(given, str) else given
    most = service.config.max_sequences
    if not texts:
        raise Refused(422, "no_sequence", "input is empty; send at least one sequence")
    if len(texts) > most:
        raise Refused(
            413,
            "too_many_sequences",
            f"{len(texts):,} sequences, and the limit is {most:,}; send fewer at once",
            param="input",
        )
    return texts


def _add_work(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", tags=["sequences"], responses=example_of("embeddings"))
    async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """Vectors of sequences, one each, in their order."""
        version = service.versions.find(body.model)
        hidden = version.encoder.hidden
        if body.dimensions not in (None, hidden):
            raise Refused(
                400,
                "dimensions_not_supported",
                f"{version.name} gives vectors of {hidden} numbers and cannot shorten them; leave "
                "dimensions out",
                param="dimensions",
            )
        embedded = await service.embed(version, _texts(service, body.input), _caller(request))
        service.metrics.sequences.labels("embeddings").inc(len(embedded.vectors))
        written = await _write_vectors(embedded.vectors, body.encoding_format)
        usage = {"prompt_tokens": embedded.tokens, "total_tokens": embedded.tokens}
        head = orjson.dumps({"object": "list", "model": version.id, "usage": usage})[:-1]
        content = b'%b,"data":[%b]}' % (head, b",".join(written))
        return Response(content, media_type="application/json")

    @app.post("/v1/classify", tags=["sequences"], responses=example_of("classify"))
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Names of sequences: a lineage cut where confidence falls, novelty, evidence."""
        version = service.versions.find(body.model)
        texts = _texts(service, body.input)
        rows, tokens = await service.classify(version, texts, body.strand, _caller(request))
        service.metrics.sequences.labels("classify").inc(len(rows))
        named = [describe_name(at, row, body.evidence) for at, row in enumerate(rows)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return answer({"object": "list", "model": version.id, "data": named, "usage": usage})

    @app.post("/v1/search", tags=["sequences"], responses=example_of("search"))
    async def search(body: SearchRequest, request: Request) -> Response:
        """The nearest rows of the reference table for each sequence, nearest first."""
        version = service.versions.find(body.model)
        if body.k > service.config.max_k:
            raise Refused(
                400, "k_too_large", f"k is {body.k}; at most {service.config.max_k}", param="k"
            )
        texts = _texts(service, body.input)
        found, tokens = await service.search(version, texts, body.k, body.where, _caller(request))
        service.metrics.sequences.labels("search").inc(len(found))
        data = [
            {"object": "search_result", "index": at, "rows": rows} for at, rows in enumerate(found)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return answer({"object": "list", "model": version.id, "data": data, "usage": usage})


async def _write_vectors(vectors: Any, encoding: str) -> list[bytes]:
    """Each vector as a JSON object; others get a turn in between."""
    written = []
    for index, vector in enumerate(vectors):
        value: Any = vector
        if encoding == "base64":
            value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        item = {"object": "embedding", "index": index, "embedding": value}
        written.append(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY))
        if index % _WRITTEN_AT_ONCE == _WRITTEN_AT_ONCE - 1:
            await asyncio.sleep(0)
    return written


def _describe(service: Service, version: Version) -> dict[str, Any]:
    return {
        "id": version.id,
        "object": "model",
        "created": version.created,
        "owned_by": "bioscan_xla",
        "name": version.name,
        "current": service.versions.is_current(version),
        "vector_length": version.encoder.hidden,
        "max_window_tokens": version.encoder.max_tokens,
        "classify": not isinstance(version.naming, str),
        "search": not isinstance(version.table, str),
        "fingerprint": {
            key: value for key, value in version.encoder.fingerprint.items() if key not in HINTS
        },
    }


def _check_admin(request: Request) -> None:
    if not request.state.is_admin:
        raise Refused(
            403,
            "admin_key_needed",
            "this needs the administrator's key, which the server takes from BIOSCAN_ADMIN_KEY",
        )


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["models"], responses=example_of("models"))
    async def models() -> Response:
        """All versions that are served."""
        data = [_describe(service, version) for version in service.versions.all()]
        return answer({"object": "list", "data": data})

    @app.get("/v1/models/{model}", tags=["models"])
    async def model(model: str) -> Response:
        """One version, by name (the current one) or by id."""
        return answer(_describe(service, service.versions.find(model)))

    @app.post("/v1/models", tags=["models"])
    async def load(body: LoadRequest, request: Request) -> Response:
        """Load a model beside the others, then let its name mean it; needs the admin key.

        Requests that have begun are finished by the version they began with. It stays addressable
        by its id until it is dropped.
        """
        _check_admin(request)
        if not body.model and not body.adapter:
            raise Refused(422, "no_model", "name a model or an adapter", param="model")
        reference = body.reference or service.config.reference
        wanted = Wanted(body.name, body.model, body.adapter, reference)
        work = functools.partial(service.load_another, wanted)
        version = await asyncio.get_running_loop().run_in_executor(None, work)
        return answer(_describe(service, version))

    @app.delete("/v1/models/{model}", tags=["models"])
    async def drop(model: str, request: Request) -> Response:
        """Drop a version, the current one of a name only by its whole id; needs the admin key."""
        _check_admin(request)
        service.jobs.check_unused(service.versions.find(model))
        version = service.versions.drop(model)
        return answer({"id": version.id, "object": "model", "deleted": True})


def _add_jobs(app: FastAPI, service: Service) -> None:
    @app.post("/v1/jobs", tags=["jobs"], status_code=202)
    async def add(body: JobRequest) -> Response:
        """Embed or name files in the background, below the folders that the server allows."""
        version = service.versions.find(body.model)
        work = functools.partial(service.jobs.add, body, version)
        job = await asyncio.get_running_loop().run_in_executor(None, work)
        return answer(job.answer, 202)

    @app.get("/v1/jobs", tags=["jobs"])
    async def jobs() -> Response:
        """All jobs, the newest first."""
        return answer({"object": "list", "data": [job.answer for job in service.jobs.all()]})

    @app.get("/v1/jobs/{job}", tags=["jobs"])
    async def find(job: str) -> Response:
        """How far a job is."""
        return answer(service.jobs.find(job).answer)

    @app.post("/v1/jobs/{job}/cancel", tags=["jobs"])
    async def cancel(job: str) -> Response:
        """Stop a job; what it has done stays."""
        return answer(service.jobs.cancel(job).answer)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> Response:
        """200 while the server works; 503 when it should be started anew."""
        is_live = service.device.is_well and service.failure is None
        return answer({"status": "live" if is_live else "broken"}, 200 if is_live else 503)

    @app.get("/health/ready", tags=["health"])
    @app.get("/health", tags=["health"])
    async def ready() -> Response:
        """200 while requests are accepted; 503 while loading and after SIGTERM."""
        state = "draining" if service.is_draining else "loading"
        if service.is_ready:
            return answer({"status": "ready"})
        return answer(
            {"status": "broken" if service.is_loaded and state == "loading" else state}, 503
        )

    @app.get("/metrics", tags=["health"])
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    def refuse(refused: Refused) -> Response:
        response = answer(refused.body, refused.status)
        response.headers.update(refused.headers)
        return response

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refuse(error)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # reaches nobody

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]  # its `input` is what was sent, and stays out of the message
        field = ".".join(str(part) for part in first["loc"][1:2])
        if first["type"] == "json_invalid":
            return refuse(Refused(400, "invalid_json", "the body is not JSON"))
        if "json" not in request.headers.get("content-type", ""):
            what = "send the body as JSON, with the header Content-Type: application/json"
            return refuse(Refused(415, "not_json", what))
        what = {"missing": "is missing"}.get(first["type"], first["msg"])
        if field == "input" and first["type"] != "missing":
            what = "must be a sequence or a list of sequences, as text; token ids are not supported"
        return refuse(Refused(422, "invalid_field", f"{field or 'body'}: {what}", param=field))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "http_error")
        return refuse(Refused(error.status_code, code, f"{error.detail}; see /docs"))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return refuse(Refused(500, "internal_error", "the server failed; its log says more"))
