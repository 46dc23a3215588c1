"""Devices: the choice, and the real torch_xla on eight virtual CPU devices."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from bioscan_xla.encode import onednn
from bioscan_xla.encode.choice import has_tpu_chip
from bioscan_xla.encode.runtime import open_device, shard_parameters
from bioscan_xla.errors import ConfigError, DeviceError

from .conftest import ROOT, cosine, run_python

needs_xla = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed"
)
EIGHT_DEVICES = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}


def test_choice_says_why(monkeypatch):
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    device = open_device("auto", "float32")
    assert device.kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.why
    assert device.dtype_name == "float32"


def test_a_tpu_is_told_by_its_pci_identity(tmp_path):
    for number, (vendor, device) in enumerate([("0x8086", "0x0063"), ("0x1ae0", "0x0042")]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(vendor + "\n")
        (tmp_path / str(number) / "device").write_text(device + "\n")
    assert not has_tpu_chip(tmp_path)  # another vendor's, and Google's network card
    (tmp_path / "1" / "device").write_text("0x0063\n")
    assert has_tpu_chip(tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="gpu"):
        open_device("gpu")
    with pytest.raises(ConfigError, match="float16"):
        open_device("cpu", "float16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_absent_gpu_is_an_error_with_a_remedy():
    with pytest.raises(DeviceError, match="--device auto"):
        open_device("cuda")


def test_sharding_needs_a_mesh():
    with pytest.raises(ConfigError, match="XLA"):
        shard_parameters(open_device("cpu"), torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.xla
@needs_xla
@pytest.mark.parametrize(
    ("dtype", "placement"), [("float32", "replicated"), ("bfloat16", "sharded")]
)
def test_eight_device_mesh(model_folder, sequences, expected, tmp_path, dtype, placement):
    texts, output = tmp_path / "sequences.txt", tmp_path / "vectors.npy"
    texts.write_text("\n".join(sequences))
    result = run_python(
        "-m",
        "tests.xla_embed",
        model_folder,
        texts,
        output,
        dtype,
        placement,
        env=EIGHT_DEVICES,
        cwd=ROOT,
    )
    report = json.loads(result.stdout.splitlines()[-1])
    vectors = np.load(output)
    if dtype == "float32":
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert cosine(vectors, expected).min() >= 0.9995
    assert report["devices"] == 8
    first, *later = report["after_pass"]
    assert first["compiles"] == len(report["shapes"]) <= 8
    assert all(counts["compiles"] == first["compiles"] for counts in later)
    assert all(counts["host_fallbacks"] == 0 for counts in report["after_pass"])
    assert all(rows % 8 == 0 for rows, _ in report["shapes"])


@pytest.mark.xla
@needs_xla
def test_a_host_of_several_is_refused():
    """Such a slice is not to be had here, so only what torch_xla says of it is imitated."""
    code = (
        "import torch_xla.runtime as xr; xr.process_count = lambda: 4;"
        "from bioscan_xla.encode.runtime import open_device; open_device('xla')"
    )
    result = run_python("-c", code, env=EIGHT_DEVICES, check=False, cwd=ROOT)
    assert "DeviceError: this host is one of 4 of a TPU slice" in result.stderr
    assert "--process-index" in result.stderr


@pytest.mark.xla
@needs_xla
def test_opened_again_after_computing(tmp_path):
    """A notebook embeds, trains and searches in one process; the compile cache is set only once."""
    code = (
        "import os\n"
        "from bioscan_xla.encode.runtime import fetch, launch, open_device, put\n"
        "import numpy as np\n"
        "for _ in range(2):\n"
        "    os.environ.pop('PJRT_DEVICE', None)\n"  # named, the CPU would have no cache
        "    device = open_device('xla', 'float32')\n"
        "    print(fetch(launch(device, put(device, np.ones((1, 2), np.float32)) + 1)))\n"
    )
    result = run_python("-c", code, env={"XLA_CACHE_DIR": str(tmp_path / "cache")}, cwd=ROOT)
    assert result.stdout.split() == ["[[2.", "2.]]"] * 2


@pytest.mark.xla
@needs_xla
def test_whole_command_on_the_mesh(model_folder, tmp_path):
    code = (
        "import bioscan_xla, sys;"
        "result = bioscan_xla.run_embedding_pipeline(sys.argv[1], sys.argv[2], model=sys.argv[3],"
        "device='xla', dtype='float32', commit_rows=10);"
        "print(result['embeddings_generated'], result['compiles'])"
    )
    fasta = tmp_path / "few.fasta"
    fasta.write_text("".join(f">s{n}\n{'ACGTTGCATG' * (5 + n)}\n" for n in range(25)))
    result = run_python("-c", code, fasta, tmp_path / "db", model_folder, env=EIGHT_DEVICES)
    embedded, compiles = result.stdout.split()[-2:]
    assert (embedded, compiles) == ("25", "1")


def test_fast_float32_is_float32_and_ends(monkeypatch):
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    with onednn.fast_float32("cpu"):
        assert ((a @ a).double() - a.double() @ a.double()).abs().max() < 1e-3
    assert setting.fp32_precision == before
    monkeypatch.setattr(onednn, "_is_precise", lambda: False)  # as on a processor with AMX
    with onednn.fast_float32("cpu"):
        assert setting.fp32_precision == before
