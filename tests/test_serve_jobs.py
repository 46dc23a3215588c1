"""Background jobs of the server: files below allowed folders, resumed after a restart."""

import errno
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'bioscan_xla[serve]'")

from bioscan_xla.classify import run_classification_pipeline
from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.errors import InputError
from bioscan_xla.reference import main as main_of_reference
from bioscan_xla.sample import write_model, write_sample
from bioscan_xla.table.neighbours import open_table

from .serving import running, until

ENDED = ("completed", "failed", "cancelled")


@pytest.fixture
def data(tmp_path):
    """An allowed folder with 60 records to read."""
    (tmp_path / "data").mkdir()
    write_sample(tmp_path / "data/reads.parquet", 60)
    return tmp_path / "data"


def ended(client, job):
    """The job once it has ended."""
    until(lambda: client.get(f"/v1/jobs/{job}").json()["status"] in ENDED, 60)
    return client.get(f"/v1/jobs/{job}").json()


def rows(db):
    table = open_table(str(db)).to_arrow().sort_by("row")
    return table.drop_columns("vector"), table["vector"]


def test_jobs_do_what_the_commands_do(model_folder, data, tmp_path):
    options = {"model": model_folder, "device": "cpu", "dtype": "float32"}
    run_embedding_pipeline(str(data / "reads.parquet"), str(tmp_path / "db"), **options)
    run_classification_pipeline(
        str(data / "reads.parquet"), str(tmp_path / "db"), str(tmp_path / "named"), **options
    )
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs")}
    with running(model=model_folder, reference=str(tmp_path / "db"), **jobs) as it:
        embed = {"kind": "embed", "input": str(data), "output": str(data / "vectors.db")}
        added = it.post("jobs", **embed)
        assert added.status_code == 202
        named = {"kind": "classify", "input": [str(data / "reads.parquet")]}
        second = it.post("jobs", **named, output=str(data / "names")).json()
        first = ended(it.client, added.json()["id"])
        assert (first["status"], first["error"]) == ("completed", None)
        assert first["result"]["total_rows"] == 60
        assert first["progress"]["records_done"] == first["progress"]["records"] >= 60
        ours, theirs = rows(data / "vectors.db"), rows(tmp_path / "db")
        assert ours[0].equals(theirs[0])
        assert ended(it.client, second["id"])["status"] == "completed"
        ids = [job["id"] for job in it.client.get("/v1/jobs").json()["data"]]
        assert ids == [second["id"], first["id"]]
        other = it.post("jobs", **embed | {"output": "/tmp/elsewhere.db"})
        assert (other.status_code, other.json()["error"]["param"]) == (403, "output")
        none = it.post("jobs", **embed | {"input": str(data / "none.fasta")})
        assert (none.status_code, none.json()["error"]["code"]) == (400, "bad_input")
        # A table of another run that cannot be added to: the job fails, the server goes on.
        (data / "broken.db").write_text("no folder")
        failed = it.post("jobs", **embed | {"output": str(data / "broken.db")}).json()
        failed = ended(it.client, failed["id"])
        assert failed["status"] == "failed"
        assert "broken.db" in failed["error"]
        assert it.client.get("/v1/jobs/job_x").status_code == 404
    wanted = pq.read_table(tmp_path / "named/classified.parquet").drop_columns(["vector", "hits"])
    found = pq.read_table(data / "names/classified.parquet").drop_columns(["vector", "hits"])
    assert found.drop_columns("novelty_trust").equals(wanted.drop_columns("novelty_trust"))


def test_jobs_of_a_whitening_server_embed_as_the_command_does(model_folder, data, tmp_path):
    """The table of a job has the transform that it has itself, by default none."""
    options = {"model": model_folder, "device": "cpu", "dtype": "float32"}
    served, output = tmp_path / "db", data / "new.db"
    run_embedding_pipeline(str(data / "reads.parquet"), str(served), **options)
    assert main_of_reference(["center", str(served)]) == 0
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs"), "num_trials": 0}
    with running(reference=str(served), reference_table="centered", **jobs) as it:
        body = {"kind": "embed", "input": str(data / "reads.parquet"), "output": str(output)}
        job = ended(it.client, it.post("jobs", **body).json()["id"])
        assert (job["status"], job["error"]) == ("completed", None)
    assert rows(output)[0].equals(rows(served)[0])


def test_a_job_is_cancelled_and_what_it_did_stays(model_folder, data, tmp_path):
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs")}
    body = {"kind": "embed", "input": str(data), "output": str(data / "vectors.db")}
    with running(model=model_folder, **jobs) as it:
        with it.busy_device():
            first, second = (it.post("jobs", **body).json()["id"] for _ in range(2))
            until(lambda: it.client.get(f"/v1/jobs/{first}").json()["status"] == "running")
            assert it.post(f"jobs/{second}/cancel").json()["status"] == "cancelled"
            it.post(f"jobs/{first}/cancel")
        assert ended(it.client, first)["status"] == "cancelled"
        assert ended(it.client, it.post("jobs", **body).json()["id"])["status"] == "completed"
        assert len(rows(data / "vectors.db")[0]) == 60
        # Requests are answered while a job runs.
        assert it.post("embeddings", input="ACGTTGCA" * 8).status_code == 200


def test_the_model_of_a_job_is_kept_until_the_job_has_ended(
    model_folder, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("BIOSCAN_ADMIN_KEY", "boss")
    admin = {"authorization": "Bearer boss"}
    write_model(tmp_path / "new", hidden=64, layers=1, heads=4, seed=5)
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs")}
    body = {"kind": "embed", "input": str(data), "output": str(data / "kept.db")}
    with running(model=model_folder, name="m", **jobs) as it:
        (old,) = it.client.get("/v1/models").json()["data"]
        with it.busy_device():
            job = it.post("jobs", **body).json()["id"]
        ended(it.client, job)
        load = {"name": "m", "model": str(tmp_path / "new")}
        new = it.client.post("/v1/models", json=load, headers=admin).json()
        with it.busy_device():
            again = it.post("jobs", **body, model=old["id"]).json()["id"]
            refused = it.client.delete(f"/v1/models/{old['id']}", headers=admin)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
            waits = it.post("jobs", **body | {"output": str(data / "b.db")}).json()
            assert waits["model"] == new["id"]
        assert ended(it.client, again)["status"] == "completed"
        assert it.client.delete(f"/v1/models/{old['id']}", headers=admin).status_code == 200
        ended(it.client, waits["id"])
        path = tmp_path / "jobs" / f"{waits['id']}.json"
    path.write_text(path.read_text().replace('"completed"', '"running"'))  # as after a kill
    with running(model=model_folder, name="m", **jobs) as it:  # the newer one was loaded later
        told = ended(it.client, waits["id"])
        assert told["status"] == "failed"
        assert f"{new['id']}, is not served any more; load it" in told["error"]


def test_without_roots_there_are_no_jobs(model_folder, data, tmp_path):
    with running(model=model_folder, jobs_folder=str(tmp_path / "jobs")) as it:
        body = {"kind": "embed", "input": str(data), "output": str(data / "x.db")}
        assert it.post("jobs", **body).json()["error"]["code"] == "no_jobs"
    assert not (tmp_path / "jobs").exists()


def test_a_server_that_ends_leaves_its_job_to_the_next(model_folder, data, tmp_path):
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs")}
    body = {"kind": "embed", "input": str(data), "output": str(data / "vectors.db")}
    with running(model=model_folder, **jobs) as it, it.busy_device():
        job = it.post("jobs", **body).json()["id"]
        until(lambda: it.client.get(f"/v1/jobs/{job}").json()["status"] == "running")
        for held in it.service.jobs.all():
            held.end()
    (described,) = (tmp_path / "jobs").glob("job_*.json")
    assert json.loads(described.read_text())["status"] == "queued"
    with running(model=model_folder, name="renamed", **jobs) as it:
        assert ended(it.client, job)["status"] == "completed"  # the same model


def test_clients_see_what_a_restart_would_find(model_folder, data, tmp_path, monkeypatch):
    """A state is on disk before anybody is told of it."""
    told, kept = [], os.replace

    def seen(source, target):
        path = Path(target)
        if path.name.startswith("job_") and path.exists():
            on_disk = json.loads(path.read_text())
            answer = service.jobs.find(path.stem).answer
            told.append({key: answer[key] for key in on_disk} == on_disk)
            told.append(on_disk["status"])
        kept(source, target)

    monkeypatch.setattr("bioscan_xla.serving.jobs.os.replace", seen)
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs")}
    body = {"kind": "embed", "input": str(data), "output": str(data / "vectors.db")}
    with running(model=model_folder, **jobs) as it:
        service = it.service
        ended(it.client, it.post("jobs", **body).json()["id"])
    assert told == [True, "queued", True, "running"]


def test_a_job_is_done_though_its_state_cannot_be_noted(
    model_folder, data, tmp_path, monkeypatch, caplog
):
    """A full disk of the jobs folder neither ends the job nor those that wait."""

    def full(source, target):
        if json.loads(Path(source).read_text())["status"] != "queued":
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        kept(source, target)

    kept = os.replace
    monkeypatch.setattr("bioscan_xla.serving.jobs.os.replace", full)
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs")}
    body = {"kind": "embed", "input": str(data), "output": str(data / "vectors.db")}
    with running(model=model_folder, **jobs) as it:
        for _ in range(2):
            assert ended(it.client, it.post("jobs", **body).json()["id"])["status"] == "completed"
    assert "completed is not noted ([Errno 28] No space left" in caplog.text
    monkeypatch.undo()
    with running(model=model_folder, **jobs) as it:
        for job in it.client.get("/v1/jobs").json()["data"]:
            assert ended(it.client, job["id"])["status"] == "completed"
    assert len(rows(data / "vectors.db")[0]) == 60


def test_a_damaged_description_is_named(model_folder, data, tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/job_1.json").write_text('{"id": "job_1"}')
    jobs = {"job_roots": [str(data)], "jobs_folder": str(tmp_path / "jobs")}
    with (
        pytest.raises(InputError, match=r"job_1\.json: not the description"),
        running(model=model_folder, **jobs),
    ):
        pass
