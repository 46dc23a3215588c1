"""Every command of the workflow guide runs, or stands under a line that says what it needs.

They run in the order of the guide, in one folder; the built-in model takes the place of 10 GB from
the hub. `make` is left to CI, which calls it.
"""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pyarrow.parquet as pq
import pytest

from bioscan_xla.cli import parse
from bioscan_xla.options import EmbedConfig, FinetuneConfig

from .conftest import ROOT, run_python

GUIDE = (ROOT / "launch/CLOUD_WORKFLOW.md").read_text()
# (the paragraph before, language, text)
BLOCKS = re.findall(r"([^\n]+)\n\n```(\w+)\n(.*?)```", GUIDE, re.DOTALL)
NEEDS = re.compile(r"\bneeds\s+(an?\b|`pip install)", re.IGNORECASE)


def blocks(marked):
    """Blocks that need something (and are not run), or the others."""
    return [
        (language, text)
        for before, language, text in BLOCKS
        if bool(NEEDS.search(_paragraph(before))) == marked
    ]


def _paragraph(last_line):
    """The whole paragraph that ends with a line, and only its last sentence."""
    at = GUIDE.index(last_line + "\n\n```")
    text = GUIDE[:at].split("\n\n")[-1] + last_line
    return re.split(r"(?<=[.!?])\s", text)[-1]


PARTS = [
    part
    for language, text in blocks(marked=False)
    for part in ([text] if language == "python" else text.splitlines())
    # test_ray.py, which has a cluster, runs the one, test_notebook.py the other
    if "--engine ray" not in part and not part.startswith("jupyter")
]
MARKED = [line for _, text in blocks(marked=True) for line in text.splitlines()]


@pytest.fixture(scope="module")
def workplace(short_sample, tmp_path_factory):
    """A folder in which the file names of the guide exist."""
    folder = tmp_path_factory.mktemp("guide")
    run_python("-m", "bioscan_xla.sample", folder / "demo", cwd=folder)
    sample = pq.read_table(folder / "demo/sample.parquet")
    (folder / "usb").mkdir()
    for name in ("reads.parquet", "labelled.parquet", "usb/reads.parquet"):
        pq.write_table(sample, folder / name)
    shutil.copy(short_sample, folder / "alike.parquet")
    (folder / "query.fasta").write_bytes((folder / "demo/query.fasta").read_bytes())
    return folder


def test_ten_sections():
    titles = re.findall(r"^## (\d+)\. ", GUIDE, re.MULTILINE)
    assert titles == [str(number) for number in range(1, 11)]
    assert len(PARTS) > 12
    assert len(MARKED) > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_it_runs(part, workplace):
    words = shlex.split(part) if "\n" not in part.strip() else ["python", "-c", part]
    if words[0] == "make":
        assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text()
        return
    if words[0] == "tail":
        assert subprocess.run(words, cwd=workplace, check=True, capture_output=True).stdout
        return
    if words[0] == "streamlit":
        assert_page_is_served(
            [ROOT / w if w.startswith("launch/") else w for w in words], workplace
        )
        return
    named = " ".join(words)
    if "bioscan_xla.plan" in words:
        pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
        words = [word.replace("labelled.parquet", "alike.parquet") for word in words]
    if words[0] == "accelerate":
        launcher = ["python", "-m", "accelerate.commands.launch", "--quiet"]
        words = [*launcher, str(ROOT / words[3]), *words[4:]]
        words += ["--num-epochs", "1", "--device", "cpu"]
    if any(name in named for name in ("embed --input", "plan ", "finetune.py")):
        words += ["--model", "demo/model"]
    assert words[0] == "python"
    run_python(*words[1:], cwd=workplace, env={"PYTHONPATH": str(ROOT)})


def assert_page_is_served(words, folder):
    pytest.importorskip("streamlit", reason="streamlit is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = {"PORT": str(port), "ADDRESS": "127.0.0.1", "HEADLESS": "true"}
    environment = {f"STREAMLIT_SERVER_{key}": value for key, value in server.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(240):
            assert process.poll() is None, process.stderr.read()
            with contextlib.suppress(OSError):
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
                assert answer.status == 200
                assert b"Streamlit" in answer.read()
                return
            time.sleep(0.25)
        pytest.fail("no answer within a minute")
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.parametrize("line", MARKED)
def test_what_needs_an_account_is_well_formed(line):
    assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0
    words = shlex.split(line)
    for word in words:
        if re.match(r"(launch|configs)/\S+$", word):
            assert (ROOT / word).is_file()
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    if words[:3] == ["python", "-m", "bioscan_xla.embed"]:
        assert parse(EmbedConfig, words[3:], "embed").input
    elif line.startswith("gcloud"):
        (command,) = [w for w in words if w.startswith("--command=")]
        inner = shlex.split(
            command.removeprefix("--command=").replace("configs/", f"{ROOT}/configs/")
        )
        assert inner[:4] == ["accelerate", "launch", "--quiet", "launch/finetune.py"]
        assert parse(FinetuneConfig, inner[4:], "finetune").train
    elif "launch/finetune.py" in words and words[0] == "accelerate":
        assert parse(FinetuneConfig, words[4:], "finetune").train
