"""Training on a mesh, killed and resumed; and hosts of one TPU slice, that train as one host."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bioscan_xla.encode import hosts
from bioscan_xla.encode.runtime import open_device
from bioscan_xla.errors import ConfigError, DeviceError

from .conftest import ROOT, small_run
from .test_train import difference

needs_xla = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed"
)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def agree(index, port, folder):
    """What one of two hosts does in `test_what_hosts_agree_on`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo", rank=index, world_size=2)
    device = replace(open_device("cpu"), process_index=index, process_count=2)
    found = {"flags": hosts.in_any(device, [index == 1, False])}
    hosts.check_same(device, "the options", "a", "b")
    try:
        hosts.check_same(device, "the sequences", "a", str(index))
    except ConfigError as error:
        found["error"] = str(error)
    with hosts.own_folder(device, f"{folder}/first") as own:
        paths = sorted(path for path in Path(own).rglob("*") if path.is_file())
        found["files"] = {str(path.relative_to(own)): path.read_text() for path in paths}
        found["own"] = own
    found["is_left"] = Path(own).exists()
    if index == 0:
        try:
            hosts.in_any(device, [False])  # the other has left
        except DeviceError as error:
            found["alone"] = str(error)
    Path(folder, f"{index}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_what_hosts_agree_on(tmp_path):
    for name in ("step_000000001", "step_000000002", "best", "part"):
        (tmp_path / "first/checkpoints" / name).mkdir(parents=True)
        (tmp_path / "first/checkpoints" / name / "labels.json").write_text(name)
    torch.multiprocessing.spawn(agree, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    assert first["flags"] == second["flags"] == [True, False]
    assert first["error"] == second["error"]
    assert "the sequences: host 1 differs from host 0" in first["error"]
    assert first["own"] == str(tmp_path / "first")
    assert first["is_left"]
    # The newest checkpoint and the best, no other; and nothing of it stays.
    assert second["files"] == {
        f"checkpoints/{name}/labels.json": name for name in ("best", "step_000000002")
    }
    assert not second["is_left"]
    assert "another host of the TPU slice stopped" in first["alone"]


def start(options, **environment):
    fixed = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.finetune_run", json.dumps(options)],
        cwd=ROOT,
        env={**os.environ, **fixed, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(*processes):
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors
        results.append(json.loads(output.splitlines()[-1]))
    return results


@pytest.fixture(scope="module")
def mesh_options(short_sample, model_folder, tmp_path_factory):
    """Options of a run on the mesh."""
    return {
        **small_run(short_sample, model_folder, str(tmp_path_factory.mktemp("mesh") / "one")),
        "device": "xla",
        "dropout": 0.0,
        "reverse_complement": 0.5,
    }


@pytest.fixture(scope="module")
def whole(mesh_options):
    """Result of the run that nothing interrupts."""
    return end(start(mesh_options))[0]


@pytest.mark.slow
@pytest.mark.xla
@needs_xla
def test_killed_and_resumed_on_the_mesh(mesh_options, whole, tmp_path):
    broken = mesh_options | {"output": str(tmp_path / "broken"), "checkpoint_minutes": 1e-9}
    killed = start(broken, KILL_AT="5")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (resumed,) = end(start(broken))
    assert difference(mesh_options["output"], broken["output"]) < 1e-6
    assert resumed["epoch_2_loss"] == pytest.approx(whole["epoch_2_loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.xla
@needs_xla
def test_a_slice_of_two_hosts_stops_together_and_resumes_as_one_host(mesh_options, whole, tmp_path):
    two = mesh_options | {"output": str(tmp_path / "two"), "push_to_hub": "lab/model"}
    pushed = tmp_path / "pushed"
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def slice_of_two(**of_second):
        common = {"MASTER_PORT": free_port(), "TMPDIR": str(temporary), "PUSHED": str(pushed)}
        first = start(two, HOST="0/2", **common)
        return end(first, start(two, HOST="1/2", **common, **of_second))

    stopped = slice_of_two(TERM_AT="3")  # only the second is told to stop
    assert [result["interrupted"] for result in stopped] == [signal.SIGTERM] * 2
    assert [path.name for path in (tmp_path / "two/checkpoints").iterdir()] == ["step_000000004"]
    resumed = slice_of_two()
    assert [result["process_index"] for result in resumed] == [0, 1]
    assert {result["model_path"] for result in resumed} == {two["output"]}
    assert resumed[0]["evaluation"] == resumed[1]["evaluation"] == whole["evaluation"]
    assert difference(mesh_options["output"], two["output"]) == 0
    assert pushed.read_text() == "lab/model\n"  # once, by the first host
    assert not list(temporary.glob("bioscan-*"))
