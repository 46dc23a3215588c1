"""Execute the notebook whole: `python -m tests.run_notebook` keeps the outputs in the file.

It runs in a folder of its own that names neither user nor machine, so the outputs name none.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch/GlobalBioScan_Cloud_Engine.ipynb"


def execute(
    folder: Path, parameters: dict[str, Any] | None = None, env: dict[str, str] | None = None
) -> Any:
    """The notebook, executed in a folder; raises if a cell does.

    Args:
        folder: working directory of the kernel.
        parameters: values that take the place of those in the notebook.
        env: environment variables besides those of this process.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(
                f"\n{name} = {value!r}" for name, value in (parameters or {}).items()
            )
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})})
    return notebook


def main() -> int:
    """Execute and write back, without execution times."""
    folder = Path(tempfile.gettempdir(), "bioscan")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    notebook = execute(folder)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, NOTEBOOK)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
