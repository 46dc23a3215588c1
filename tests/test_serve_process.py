"""The server as a process of its own: killed, started again, ended by a signal."""

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'bioscan_xla[serve]'")

from bioscan_xla.errors import TableError
from bioscan_xla.sample import write_sample
from bioscan_xla.table.neighbours import open_table

from .conftest import ROOT, run_python
from .serving import free_port, until

SEQUENCE = "ACGTTGCATGCCATTGACCTAGGATCCAAGTCGATTACGCTAGCTAACGGTT"
RECORDS = 400
GUIDE = (ROOT / "docs/serving.md").read_text()


@contextmanager
def served(words, folder=ROOT):
    """The command with these words and a key: its process and a client, once it is ready."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "bioscan_xla.serve", "--port", str(port), *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "BIOSCAN_API_KEY": "secret-key", "PYTHONPATH": str(ROOT)},
    )
    headers = {"authorization": "Bearer secret-key"}

    def is_ready():
        assert process.poll() is None, process.stderr.read()
        try:
            return client.get("/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
        try:
            until(is_ready, 60)
            yield process, client
        finally:
            process.kill()
            process.communicate()


def count(db):
    try:
        return open_table(str(db)).count_rows()
    except TableError:
        return 0


@pytest.mark.slow
def test_killed_then_started_again_then_ended(model_folder, tmp_path):
    """A job goes on after `kill -9`; SIGTERM lets what was accepted finish."""
    (tmp_path / "data").mkdir()
    data, db = tmp_path / "data/reads.parquet", tmp_path / "data/vectors.db"
    write_sample(data, RECORDS)
    words = f"--model {model_folder} --dtype float32 --device cpu --job-roots {data.parent} "
    words = [*words.split(), "--jobs-folder", str(tmp_path / "jobs")]
    with served(words) as (process, client):
        body = {"kind": "embed", "input": str(data), "output": str(db)}
        job = client.post("/v1/jobs", json=body).json()["id"]
        until(lambda: client.get(f"/v1/jobs/{job}").json()["status"] == "running", 30)
        process.kill()
        process.wait()
    (described,) = (tmp_path / "jobs").glob("job_*.json")
    assert json.loads(described.read_text())["status"] == "running"
    assert count(db) < RECORDS
    with served(words) as (process, client):
        until(lambda: client.get(f"/v1/jobs/{job}").json()["status"] == "completed", 60)
        rows = open_table(str(db)).to_arrow()["row"].to_pylist()
        assert sorted(rows) == list(range(RECORDS))
        end_while_requests_wait(process, client)


def end_while_requests_wait(process, client):
    """What is in the queue is answered, what comes later refused; then the command ends well."""

    def ask(number):
        text = SEQUENCE[number:] + "ACGTAC" * 20_000
        return client.post("/v1/embeddings", json={"input": text})

    def waiting():
        return re.search(r"\nbioscan_queue_requests (\S+)", client.get("/metrics").text)[1]

    with ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(ask, number) for number in range(3)]
        until(lambda: waiting() == "3.0")
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/health/ready").status_code == 503)
        refused = ask(0)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert client.get("/health/live").status_code == 200
    assert [answer.result().status_code for answer in accepted] == [200, 200, 200]
    assert process.wait(30) == 0
    log = process.stderr.read()
    assert "finishing 3 requests" in log
    for secret in ("secret-key", SEQUENCE, "Traceback"):
        assert secret not in log


@pytest.mark.slow
def test_the_commands_of_the_guide(tmp_path):
    """In their order, in an empty folder, on another port."""
    blocks = re.findall(r"```(sh|python)\n(.*?)```", GUIDE, re.DOTALL)
    start, ask, example = (text for _, text in blocks[:3])
    *before, command = start.splitlines()
    for line in before:
        run_python(*line.split()[1:], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    words = command.split()[3:]
    assert words[-2:] == ["--port", "8000"]
    with served([*words[:-2], "--num-trials", "60"], tmp_path) as (_, client):
        at = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "cwd": tmp_path, "text": True}
        with_key = "curl -sS -H 'Authorization: Bearer secret-key'"
        for line in ask.splitlines():
            line = line.replace("curl", with_key).replace(
                "http://127.0.0.1:8000", str(client.base_url)
            )
            answer = json.loads(subprocess.check_output(["bash", "-c", line], **at))
            assert answer.get("status") == "ready" or answer["data"]
        url = str(client.base_url).rstrip("/")
        example = example.replace("http://127.0.0.1:8000", url).replace('"none"', '"secret-key"')
        assert run_python("-c", example, cwd=tmp_path).stdout.split() == ["[256,", "256]", "224"]


@pytest.mark.xla
@pytest.mark.slow
def test_on_xla_nothing_is_compiled_once_it_is_ready(model_folder, sequences, expected, tmp_path):
    usable = [
        at for at, text in enumerate(sequences) if len(text) >= 20 and text.strip("N") == text
    ]
    (tmp_path / "texts").write_text("\n".join(sequences[at] for at in usable))
    words = [model_folder, tmp_path / "texts", tmp_path / "vectors.npy"]
    environment = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    told = json.loads(
        run_python("-m", "tests.xla_serve", *words, cwd=ROOT, env=environment).stdout.splitlines()[
            -1
        ]
    )
    ready, served = told["counted"]
    assert told["kind"] == "xla"
    assert ready["compiles"] >= 2
    assert served == ready  # and no operation fell back to the host
    found = np.load(tmp_path / "vectors.npy")
    np.testing.assert_allclose(found, expected[usable], atol=2e-4)
