"""launch/ray_serve.py on a real local Ray cluster."""

import importlib.util
import os
import sys

import httpx
import numpy as np
import pytest

from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import embed_text
from bioscan_xla.encode.runtime import open_device

from .conftest import ROOT
from .serving import free_port

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[serve]'")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed: 'ray[serve]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lancedb fork support:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:lance is not fork-safe:UserWarning"),
]


@pytest.fixture
def port():
    """Of Ray Serve's proxy, on a cluster of this machine."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    context = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": 2}
    ray.init(address="local", object_store_memory=100 * 2**20, log_to_driver=False, **context)
    taken = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": taken})
    yield taken
    serve.shutdown()
    ray.shutdown()


def test_a_replica_answers_as_the_server_does(port, model_folder, sequences, monkeypatch):
    path = ROOT / "launch/ray_serve.py"
    spec = importlib.util.spec_from_file_location("ray_serve", path)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ray_serve", example)
    spec.loader.exec_module(example)
    ray.cloudpickle.register_pickle_by_value(example)  # replicas need not find the file
    options = {"model": model_folder, "name": "tiny", "dtype": "float32", "device": "cpu"}
    serve.run(example.build({**options, "replicas": "1", "job_roots": "/"}))
    usable = [text for text in sequences if len(text) >= 20][:12]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        answer = client.post("/v1/embeddings", json={"input": usable, "model": "tiny"})
        vectors = [item["embedding"] for item in answer.json()["data"]]
        bad = client.post("/v1/embeddings", json={"input": [usable[0], "ACXT"]})
        assert (bad.status_code, bad.json()["error"]["param"]) == (422, "input[1]")
        body = {"kind": "embed", "input": "/x.fasta", "output": "/x"}
        assert client.post("/v1/jobs", json=body).json()["error"]["code"] == "no_jobs"
        assert client.get("/health/ready").status_code == 200
    encoder = load_encoder(model_folder, device=open_device("cpu", "float32"))
    np.testing.assert_allclose(np.array(vectors), embed_text(encoder, usable), atol=2e-5)
