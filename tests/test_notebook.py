"""The notebook: executed whole, and what is kept in it."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import lancedb
import pyarrow.parquet as pq
import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

from bioscan_xla.sample import write_query  # noqa: E402

from .conftest import ROOT, run_python  # noqa: E402
from .run_notebook import NOTEBOOK, execute  # noqa: E402

STEPS = (
    "Set-up and device check",
    "Model",
    "Mesh",
    "Streaming",
    "Batch embedding",
    "LoRA set-up",
    "Training",
    "LanceDB export",
    "Monitoring",
    "Checkpoints",
)


@pytest.fixture(scope="module")
def kept():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook):
    """All that the cells printed or showed as text."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in code_cells(notebook)
        for output in cell.outputs
    )


def check(folder, notebook, num_rows, num_epochs):
    """The key results of a run on a sample of so many usable sequences."""
    assert f"{num_rows + 2} records" in text_of(notebook)
    assert f"0 embedded anew, {num_rows} rows" in text_of(notebook)
    database = lancedb.connect(str(folder / "demo/embeddings.db"))
    for name in ("embeddings", "tuned"):
        assert database.open_table(name).count_rows() == num_rows
    exported = pq.read_table(folder / "demo/tuned.parquet")
    assert len(set(exported["sequence_id"].to_pylist())) == num_rows
    metrics = json.loads((folder / "demo/classifier/metrics.json").read_text())
    assert metrics["num_epochs"] == num_epochs
    return metrics


@pytest.mark.slow
def test_it_runs_whole_as_it_stands_by_the_command_of_the_guide(tmp_path):
    guide = (ROOT / "launch/CLOUD_WORKFLOW.md").read_text()
    (line,) = re.findall(r"^jupyter execute launch/.*$", guide, re.MULTILINE)
    shutil.copy(NOTEBOOK, tmp_path)
    program, _, path, *options = shlex.split(line)
    words = ("-m", program, "execute", tmp_path / Path(path).name, *options)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run_python(*words, env={"PYTHONPATH": str(ROOT), "PATH": path}, cwd=tmp_path)
    notebook = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    metrics = check(tmp_path, notebook, 400, num_epochs=8)
    assert metrics["epoch_8_loss"] < metrics["epoch_1_loss"]
    assert metrics["evaluation"]["phylum/accuracy"] > 0.4  # chance is 0.21
    assert metrics["evaluation"]["species/accuracy"] > 0.2  # chance is 0.05


@pytest.mark.slow
@pytest.mark.xla
@pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed"
)
def test_it_runs_whole_on_a_mesh_with_other_data(short_sample, model_folder, tmp_path):
    """One process embeds, trains and searches on eight virtual devices, as it would on a TPU."""
    (tmp_path / "demo").mkdir()
    write_query(tmp_path / "new.fasta")
    notebook = execute(
        tmp_path,
        {
            "DEVICE": "xla",
            "INPUT": short_sample,
            "LABELLED": short_sample,
            "MODEL": model_folder,
            "QUERY": "new.fasta",
            # Without dropout, which takes seconds a step there.
            "TRAINING": {"num_epochs": 1, "batch_size": 16, "dtype": "float32", "dropout": 0.0},
        },
        {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"},
    )
    check(tmp_path, notebook, 60, num_epochs=1)
    assert "xla x 8" in text_of(notebook)
    assert "{'data': 8}" in text_of(notebook)


def test_ten_steps_in_order(kept):
    titles = [
        re.match(r"## (\d+)\. (.*)", cell.source).groups()
        for cell in kept.cells
        if cell.source.startswith("## ")
    ]
    assert titles == [(str(number), step) for number, step in enumerate(STEPS, 1)]


def test_cells_are_short_and_define_nothing(kept):
    for cell in code_cells(kept):
        assert len(cell.source.splitlines()) <= 14, cell.source
        plain = re.sub(r"^(\s*)%.*$", r"\1pass", cell.source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(plain)):
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
            assert not isinstance(node, kinds), cell.source


def test_outputs_are_kept_of_a_whole_run(kept):
    cells = code_cells(kept)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = [cell for cell in cells if not cell.outputs]
    assert len(silent) <= 2  # parameters, and an installation that was there
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


def test_outputs_name_no_machine(kept):
    """Only the neutral folder of `run_notebook`, and no user, host or environment."""
    text = text_of(kept)
    assert not re.search(r"/(home|root|work|Users|opt|usr)/|site-packages|\.venv|Traceback", text)
    assert set(re.findall(r"/tmp/\w+", text)) <= {"/tmp/bioscan"}
