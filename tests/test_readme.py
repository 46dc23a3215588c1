"""Every command of the README and of docs/ runs, on the built-in sample.

Left out are `plan finetune`, whose minutes of compiling are in test_plan.py for one program,
several processes, which test_shares.py runs, `serve` (test_serve_guide.py), and `federate`
(test_federation.py).
"""

import json
import re
import shlex

import pytest

from bioscan_xla.reads.labels import LabelSpace
from bioscan_xla.reads.lineages import RANKS

from .conftest import ROOT, run_python

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```\w*\n(.*?)```", "\n".join(page.read_text() for page in PAGES), re.DOTALL)
NOT_RUN = (
    "plan finetune",
    "--process-index",
    "SOURCE",
    "bioscan_xla.serve ",
    "bioscan_xla.federate ",
)
COMMANDS = list(
    dict.fromkeys(
        line.split("#")[0].strip()
        for block in BLOCKS
        for line in block.splitlines()
        if re.match(r"(\.venv/bin/)?python -m bioscan_xla", line)
        and not any(part in line for part in NOT_RUN)
    )
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the file names of the README exist."""
    folder = tmp_path_factory.mktemp("readme")
    run_python("-m", "bioscan_xla.sample", folder / "demo", cwd=folder)
    run_python(
        "-m",
        "bioscan_xla.embed",
        "--input",
        "demo/sample.parquet",
        "--db",
        "demo/embeddings.db",
        "--model",
        "demo/model",
        "--keep",
        "marker",
        cwd=folder,
    )
    for name in ("reads.parquet", "labelled.parquet"):
        (folder / name).write_bytes((folder / "demo/sample.parquet").read_bytes())
    for name in ("query.fasta", "asv.fasta"):
        (folder / name).write_bytes((folder / "demo" / name).read_bytes())
    return folder


def test_there_are_commands():
    assert len(COMMANDS) >= 3
    assert any("make demo" in block for block in BLOCKS)
    assert any("make test" in block for block in BLOCKS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, workplace):
    words = shlex.split(command)[1:]
    if "bioscan_xla.plan" in words:
        pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    if {"bioscan_xla.embed", "bioscan_xla.plan"} & {*words} and "--config" not in words:
        words += ["--model", "demo/model"]  # in place of 10 GB from the hub
    if "bioscan_xla.classify" in words:
        words += ["--num-trials", "60"]
    if "bioscan_xla.pretrain" in words:
        words += ["--hidden", "32", "--layers", "1", "--max-steps", "5", "--device", "cpu"]
    result = run_python(*words, cwd=workplace)
    assert result.stdout


def test_finetune_command(tmp_path):
    """The demo of fine-tuning, in an empty folder: well above chance at every rank."""
    (command,) = [
        line for block in BLOCKS for line in block.splitlines() if "finetune_demo.yaml" in line
    ]
    words = [str(ROOT / w) if w.startswith(("configs/", "launch/")) else w for w in command.split()]
    assert words[:2] == ["accelerate", "launch"]
    run_python("-m", "accelerate.commands.launch", *words[2:], cwd=tmp_path)
    metrics = json.loads((tmp_path / "demo/classifier/metrics.json").read_text())["evaluation"]
    space = LabelSpace.load(tmp_path / "demo/classifier/labels.json")
    for rank, counts in zip(RANKS, space.counts, strict=True):
        chance = max(counts) / sum(counts)
        assert metrics[f"{rank}/accuracy"] > min(0.99, 2 * chance), rank


def test_python_example(workplace):
    (block,) = [b for b in BLOCKS if "run_embedding_pipeline(" in b and "import lancedb" in b]
    block = block.replace("max_sequences=1000", "max_sequences=50, model='demo/model'")
    block = block.replace("vectors.db", "example.db").replace("ACGTTGCA...", "ACGTTGCA" * 8)
    result = run_python("-c", block, cwd=workplace)
    assert result.stdout.split()[:2] == ["50", "0"]


def test_demo_of_the_makefile(tmp_path):
    recipe = (ROOT / "Makefile").read_text().split("\ndemo: ")[1].split("\n\n")[0]
    recipe = recipe.replace("\\\n", "")
    lines = re.findall(r"python (-m bioscan_xla\S* .*)", recipe)
    assert len(lines) == 4
    assert "launch/finetune.py --config configs/finetune_demo.yaml" in recipe
    for line in lines:
        words = shlex.split(line.rstrip('"'))
        words = [str(ROOT / w) if w.startswith("configs/") else w for w in words]
        if "bioscan_xla.classify" in words:
            words += ["--num-trials", "60"]
        assert run_python(*words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "demo/classified/report.html").is_file()
