"""The files in launch/: JobSet, RayJob and pods by their schemas, SLURM scripts by sbatch."""

import os
import shlex
import shutil
import socket
import subprocess
import time

import pytest
import yaml

from bioscan_xla.cli import parse
from bioscan_xla.options import EmbedConfig, FinetuneConfig, ServeConfig

from .conftest import ROOT

LAUNCH = ROOT / "launch"
JOBSETS = sorted(LAUNCH.glob("gke-jobset-*.yaml"))
each_jobset = pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
SCRIPTS = sorted(LAUNCH.glob("*.sbatch"))


def load(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def assert_kept(ours, theirs, path=""):
    """Every field that we wrote is one that the schema's model kept."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            assert key in theirs, f"{path}.{key} is not a field"
            assert_kept(value, theirs[key], f"{path}.{key}")
    elif isinstance(ours, list):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_kept(one, other, f"{path}[{number}]")
    else:
        assert ours == theirs, path


def assert_pod(template):
    """A pod template by Kubernetes' own schema, in which unknown fields are errors."""
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **template}
    pod["metadata"] = {"name": "p", **template.get("metadata", {})}
    validator.validate(pod, "1.33", strict=True)


def pod_of(path):
    """The one pod template of a JobSet, and the job that it belongs to."""
    (job,) = load(path.name)["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"], job


def rayjob():
    return load("kuberay-embed.yaml")


@each_jobset
def test_jobset_by_the_models_of_its_schema(path):
    models = pytest.importorskip(
        "kubeflow_trainer_api.models.jobset_v1alpha2_job_set",
        reason="kubeflow-trainer-api, which carries JobSet's schema, is not installed",
    )
    ours = load(path.name)
    assert_kept(ours, models.JobsetV1alpha2JobSet.from_dict(ours).to_dict())
    wrong = load(path.name)
    wrong["spec"]["replicatedJob"] = []
    with pytest.raises(AssertionError, match="replicatedJob is not a field"):
        assert_kept(wrong, models.JobsetV1alpha2JobSet.from_dict(wrong).to_dict())


def test_pods_by_kubernetes():
    for path in JOBSETS:
        assert_pod(pod_of(path)[0])
    cluster = rayjob()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert_pod(group["template"])
    with pytest.raises(Exception, match="nodeSelectors"):
        assert_pod({"spec": {"containers": [], "nodeSelectors": {}}})


@each_jobset
def test_jobs_of_the_jobset_by_kubernetes(path):
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    job = pod_of(path)[1]
    head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
    validator.validate(head | job["template"], "1.33", strict=True)


def test_ray_cluster_by_rays_own_reader():
    """What Ray's autoscaler makes of the file, TPU hosts included."""
    reader = pytest.importorskip(
        "ray.autoscaler._private.kuberay.autoscaling_config", reason="ray is not installed"
    )
    spec = rayjob()["spec"]["rayClusterSpec"]
    read = reader._derive_autoscaling_config_from_ray_cr(
        {"metadata": {"namespace": "default", "name": "embed"}, "spec": spec}
    )
    types = read["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["v5e-8"]["resources"] | {"TPU": 8, "CPU": 100} == types["v5e-8"]["resources"]
    assert (types["v5e-8"]["min_workers"], types["v5e-8"]["max_workers"]) == (8, 8)


RAYJOB = {
    "apiVersion": None,
    "kind": None,
    "metadata": None,
    "spec": {
        "entrypoint": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "headGroupSpec": {"rayStartParams": dict, "template": dict},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "numOfHosts": int,
                    "rayStartParams": dict,
                    "template": dict,
                }
            ],
        },
    },
}
"""Fields of ray.io/v1 RayJob that we use, after KubeRay's API reference
(https://docs.ray.io/en/master/kuberay/references/api.html); all others are refused."""


def assert_shape(value, shape, path=""):
    if isinstance(shape, dict):
        assert isinstance(value, dict), path
        assert not set(value) - set(shape), f"{path}: {set(value) - set(shape)} unknown"
        for key, item in value.items():
            assert_shape(item, shape[key], f"{path}.{key}")
    elif isinstance(shape, list):
        for item in value:
            assert_shape(item, shape[0], path)
    elif shape is not None:
        assert isinstance(value, shape), path


def test_rayjob_has_known_fields_only():
    assert_shape(rayjob(), RAYJOB)
    assert (rayjob()["apiVersion"], rayjob()["kind"]) == ("ray.io/v1", "RayJob")
    values = [*rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].values()]
    assert all(isinstance(value, str) for value in values)


def command_of(path):
    """The words of a JobSet's container, its paths as they are in the image."""
    (container,) = pod_of(path)[0]["spec"]["containers"]
    image = (LAUNCH / "Dockerfile.tpu").read_text()
    assert f"WORKDIR {container['workingDir']}\n" in image
    for folder in ("configs", "launch"):
        assert f"COPY {folder} {folder}\n" in image
    return container["command"], container["args"]


def test_their_commands_are_options_of_embed(monkeypatch):
    monkeypatch.chdir(ROOT)
    command, words = command_of(LAUNCH / "gke-jobset-tpu.yaml")
    assert command == ["python", "-m", "bioscan_xla.embed"]
    words = [word.replace("$(JOB_INDEX)", "7") for word in words]
    config = parse(EmbedConfig, words, "embed")
    assert config.process_count == pod_of(LAUNCH / "gke-jobset-tpu.yaml")[1]["replicas"]
    assert config.device == "xla"
    words = shlex.split(rayjob()["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "bioscan_xla.embed"]
    assert parse(EmbedConfig, words[3:], "embed").engine == "ray"


def test_the_slice_runs_one_fine_tuning_on_all_its_hosts(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = LAUNCH / "gke-jobset-finetune.yaml"
    command, words = command_of(path)
    assert command == ["accelerate", "launch", "--quiet", "launch/finetune.py"]
    config = parse(FinetuneConfig, words, "finetune")
    assert config.device == "xla"
    pod, job = pod_of(path)
    spec = job["template"]["spec"]
    chips = int(pod["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"])
    rows, columns = pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert spec["parallelism"] == spec["completions"]
    assert spec["completions"] * chips == int(rows) * int(columns)
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    (kept,) = [m["name"] for m in mounts if config.output.startswith(m["mountPath"] + "/")]
    assert "persistentVolumeClaim" in volumes[kept]


def test_the_server_of_kubernetes():
    """Each object by Kubernetes' own schema; what they say of one another fits."""
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    objects = list(yaml.safe_load_all((LAUNCH / "kubernetes-serve.yaml").read_text()))
    for item in objects:
        validator.validate(item, "1.33", strict=True)
    by_kind = {item["kind"]: item["spec"] for item in objects}
    template = by_kind["Deployment"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "bioscan_xla.serve"]
    config = parse(ServeConfig, container["args"], "serve")
    (port,) = container["ports"]
    assert (config.host, config.port) == ("0.0.0.0", port["containerPort"])
    for probe, path in (("startup", "ready"), ("readiness", "ready"), ("liveness", "live")):
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked == {"path": f"/health/{path}", "port": port["name"]}
    # Its key is a secret; it has time to take itself off the list and to finish.
    assert all("value" not in item for item in container["env"] if item["name"].endswith("_KEY"))
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] > wait + config.drain_seconds
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert by_kind[kind]["selector"]["matchLabels"] == labels
    assert by_kind["Service"]["selector"] == labels
    assert by_kind["Service"]["ports"][0]["targetPort"] == port["name"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_scripts_are_sound_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert not result.stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A real SLURM controller on the loopback address: four nodes of four GPUs, none of them up."""
    controller = shutil.which("slurmctld") or shutil.which("/usr/sbin/slurmctld")
    if controller is None or shutil.which("sbatch") is None:
        pytest.skip("SLURM is not installed (Debian: slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("a SLURM controller of one's own needs root")
    folder = tmp_path_factory.mktemp("slurm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "gres.conf").write_text("")
    config = folder / "slurm.conf"
    config.write_text(
        f"""ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}
ProctrackType=proctrack/linuxproc
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
NodeName=gpu[1-4] NodeAddr=127.0.0.1 CPUs=64 RealMemory=512000 Gres=gpu:4 State=CLOUD
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = {**os.environ, "SLURM_CONF": str(config)}
    process = subprocess.Popen(
        [controller, "-D", "-f", config], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(100):
            asked = subprocess.run(
                ["scontrol", "ping"], env=environment, capture_output=True, check=False, text=True
            )
            if " is UP" in asked.stdout:
                break
            if process.poll() is not None:
                pytest.skip(f"slurmctld does not run here: {process.stderr.read()[-300:]}")
            time.sleep(0.1)
        yield environment
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_sbatch_accepts_the_scripts(slurm, script, tmp_path):
    def submit(path):
        words = ["sbatch", "--test-only", path, "reads/*.parquet", "vectors.db"]
        return subprocess.run(words, env=slurm, capture_output=True, text=True, check=False)

    accepted = submit(script)
    assert accepted.returncode == 0, accepted.stderr
    assert "to start at" in accepted.stderr
    too_large = tmp_path / script.name
    too_large.write_text(script.read_text().replace("#SBATCH --nodes=2", "#SBATCH --nodes=20"))
    assert submit(too_large).returncode != 0
