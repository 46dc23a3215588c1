"""Background jobs: files to embed or to name, one after another.

Input: requests for jobs. Output: tables and folders, as embed and classify make them.
Invariants: a job is described in a file before it is promised, and what clients see of it is
what the file says; its progress is in its own output, so that after a restart it goes on where
that ends; requests of clients come first on the device.
"""

import json
import logging
import os
import queue
import signal
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BioscanError, InputError, ModelError, first_line
from ..options import EmbedConfig
from ..stopping import Stop
from .refusals import Refused
from .roots import Roots
from .versions import Version, Versions

if TYPE_CHECKING:
    from .requests import JobRequest

log = logging.getLogger(__name__)

_MOST_WAITING = 100
_KEPT = ("embeddings_generated", "total_rows", "classified", "named", "novel", "rejected")


@dataclass(frozen=True)
class Description:
    """What is kept of a job.

    Attributes:
        id: `job_` and 32 hexadecimal digits.
        kind: `embed` or `classify`.
        input: files, resolved.
        output: database or folder, resolved.
        model: id of the version.
        created_at: in seconds since 1970.
        status: queued, running, completed, failed or cancelled.
        error: what went wrong, for people.
        result: figures of a job that has ended.
    """

    id: str
    kind: str
    input: list[str]
    output: str
    model: str
    created_at: int
    status: str = "queued"
    error: str | None = None
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Job:
    """A job of this process: its description, how far it is, and what stops it."""

    told: Description
    done: int = 0
    total: int | None = None
    stop: Stop = field(default_factory=lambda: Stop(threading.Event()))
    is_cancelled: bool = False

    def report(self, done: int, total: int | None) -> None:
        """Note how far it is."""
        self.done, self.total = done, total

    def end(self) -> None:
        """Let it commit what it has and stop."""
        self.stop.signal_number = signal.SIGTERM
        self.stop.event.set()

    @property
    def answer(self) -> dict[str, Any]:
        """What clients see."""
        progress = {"records_done": self.done, "records": self.total}
        return {"object": "job", **asdict(self.told), "progress": progress}


def _read(path: Path) -> Description:
    try:
        return Description(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: not the description of a job ({first_line(error)}); remove the file"
        ) from error


class Jobs:
    """All jobs of a server."""

    def __init__(self, folder: str, roots: list[str], versions: Versions):
        """Only keeps the options; `start` reads what an earlier server left."""
        self._folder, self._roots, self._versions = Path(folder), Roots(roots), versions
        self._jobs: dict[str, Job] = {}
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._is_open = bool(roots)
        self._is_closing = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Go on with the jobs of an earlier server and take new ones."""
        if not self._is_open:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        described = [_read(path) for path in self._folder.glob("job_*.json")]
        for told in sorted(described, key=lambda told: (told.created_at, told.id)):
            goes_on = told.status in ("queued", "running")
            job = self._jobs[told.id] = Job(replace(told, status="queued") if goes_on else told)
            job.done = int(told.result.get("records_done", 0))
            if goes_on:
                self._waiting.put(job)
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def add(self, request: "JobRequest", version: Version) -> Job:
        """Check a request, describe the job on disk and let it wait.

        Raises:
            Refused: files elsewhere, no reference, or too many jobs.
        """
        if not self._is_open:
            raise Refused(
                403, "no_jobs", "the server takes no background jobs; start it with --job-roots"
            )
        if request.kind == "classify" and isinstance(version.naming, str):
            raise Refused(400, "no_reference", version.naming)
        if self._waiting.qsize() >= _MOST_WAITING:
            raise Refused(
                429, "too_many_jobs", f"{_MOST_WAITING} jobs wait already", retry_after_seconds=60
            )
        output = self._roots.find_output(request.output)
        if request.kind == "classify" and "://" in output:
            raise Refused(400, "remote_output", "classify writes into a local folder only")
        try:
            files = self._roots.find_inputs(request.input)
        except BioscanError as error:
            raise Refused(400, "bad_input", str(error), param="input") from error
        name = f"job_{uuid.uuid4().hex}"
        now = int(time.time())
        job = Job(Description(name, request.kind, files, output, version.id, now))
        self._write(job.told)
        self._jobs[name] = job
        self._waiting.put(job)
        return job

    def find(self, name: str) -> Job:
        """A job by its id; Refused, 404, if there is none."""
        job = self._jobs.get(name)
        if job is None:
            raise Refused(404, "job_not_found", "there is no such job")
        return job

    def all(self) -> list[Job]:
        """All jobs, the newest first."""
        return list(reversed(self._jobs.values()))

    def check_unused(self, version: Version) -> None:
        """Refused, 409, if a job that has not ended is to be done with this version."""
        for job in list(self._jobs.values()):
            if job.told.model == version.id and job.told.status in ("queued", "running"):
                raise Refused(
                    409,
                    "model_in_use",
                    f"{version.id} is needed by {job.told.id}; wait for it or cancel it first",
                )

    def cancel(self, name: str) -> Job:
        """Stop a job; what it has done stays."""
        job = self.find(name)
        with self._lock:
            if job.told.status in ("queued", "running"):
                job.is_cancelled = True
                job.end()
                if job.told.status == "queued":
                    self._settle(job, "cancelled")
        return job

    def close(self) -> None:
        """Let the job that runs commit what it has; the next server goes on with it."""
        self._is_closing = True
        for job in list(self._jobs.values()):
            job.end()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None and not self._is_closing:
            with self._lock:
                if job.told.status != "queued":
                    continue
                self._settle(job, "running")
            error: object = None
            result: dict[str, Any] = {}
            try:
                result = self._work(job)
                error = result.get("failure")
            except (BioscanError, Refused) as refused:
                error = refused
            except Exception as unforeseen:  # the server goes on
                log.exception("%s failed", job.told.id)
                error = f"the server failed: {first_line(unforeseen)}"
            with self._lock:
                self._end(job, error, result)

    def _end(self, job: Job, error: object, result: dict[str, Any]) -> None:
        status = "cancelled" if job.is_cancelled else "completed"
        if job.stop.event.is_set() and not job.is_cancelled:
            status = "queued"  # the server ends; the next one goes on
        outcome: dict[str, Any] = {}
        if result:
            figures = {key: result[key] for key in _KEPT if key in result}
            outcome["result"] = {"records_done": job.done} | figures
        if error is not None:
            status, outcome["error"] = "failed", str(error)
        self._settle(job, status, **outcome)

    def _work(self, job: Job) -> dict[str, Any]:
        version = self._version_of(job)
        if job.told.kind == "embed":
            from ..embedding.run import embed

            config = EmbedConfig(input=job.told.input, db=job.told.output)
            return embed(config, encoder=version.shared, stop=job.stop, on_progress=job.report)
        from ..classification.run import classify

        opened = version.naming
        if isinstance(opened, str):
            raise Refused(400, "no_reference", opened)
        config_of = replace(opened.config, input=job.told.input, output=job.told.output)
        return classify(config_of, opened=opened, stop=job.stop, on_progress=job.report)

    def _version_of(self, job: Job) -> Version:
        """The version of the job, or the same model under another name."""
        try:
            return self._versions.find(job.told.model)
        except Refused as error:
            mark = job.told.model.rpartition("@")[2]
            for version in self._versions.all():
                if version.id.rpartition("@")[2] == mark:
                    return version
            raise ModelError(
                f"the model of the job, {job.told.model}, is not served any more; load it, then "
                "post the job again: it goes on where it stopped"
            ) from error

    def _settle(self, job: Job, status: str, **outcome: Any) -> None:
        told = replace(job.told, status=status, **outcome)
        try:
            self._write(told)
        except OSError as error:
            log.warning(
                "%s: %s is not noted (%s); after a restart it goes on from its own output",
                told.id,
                status,
                error,
            )
        job.told = told
        log.info("%s (%s): %s", told.id, told.kind, status)

    def _write(self, told: Description) -> None:
        path = self._folder / f"{told.id}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(told), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
