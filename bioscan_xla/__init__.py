"""bioscan_xla: environmental DNA sequences in, vectors and names out.

Input: nothing; the public names are loaded when they are first used. Output: the functions below,
and the LanceDB embedding function, so that `table.search("ACGT...")` works. Invariants: importing
the package loads neither torch nor transformers nor lancedb.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .classify import run_classification_pipeline
    from .embed import run_embedding_pipeline
    from .finetune import run_finetuning_pipeline
    from .training.classifier import TaxonomyClassifier

    __version__: str

__all__ = [
    "__version__",
    "load_classifier",
    "run_classification_pipeline",
    "run_embedding_pipeline",
    "run_finetuning_pipeline",
]

# Where torch_xla is installed, transformers would start its runtime just to check for a device.
# Only encode/runtime.py starts it.
os.environ.setdefault("USE_TORCH_XLA", "0")

_HOMES = {
    "run_classification_pipeline": ".classify",
    "run_embedding_pipeline": ".embed",
    "run_finetuning_pipeline": ".finetune",
}
_LANCEDB = "lancedb.embeddings"
_FUNCTION = "bioscan_xla.table.embedding_function"


def load_classifier(
    folder: "str | Path",
    device: str = "auto",
    dtype: str | None = None,
    model: "str | Path | None" = None,
) -> "TaxonomyClassifier":
    """Load a fine-tuned model, in evaluation mode.

    Args:
        folder: the output folder of fine-tuning.
        device: `auto` (TPU, then GPU, then CPU), `xla`, `cuda` or `cpu`.
        dtype: `bfloat16` or `float32`; None takes bfloat16 where the device multiplies it natively.
        model: the base model, where it is no longer where it was at training.

    Raises:
        ModelError: a file is missing or does not fit.
        InputError: `labels.json` is not a label space.
    """
    from .encode.runtime import open_device
    from .training.classifier import load_classifier as load

    return load(folder, open_device(device, dtype), None if model is None else str(model))


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    elif name == "__version__":
        value = _find_version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})


def _find_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bioscan_xla")
    except PackageNotFoundError:  # used from a source tree that was never installed
        return "0+source"


class _RegisterAfter(importlib.abc.MetaPathFinder):
    """Registers our embedding function as soon as somebody imports LanceDB's registry."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the registry's module as usual, with a step added behind its execution."""
        if fullname != _LANCEDB:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_FUNCTION)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _LANCEDB in sys.modules:
    importlib.import_module(_FUNCTION)
else:
    sys.meta_path.insert(0, _RegisterAfter())
