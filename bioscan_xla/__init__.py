"""bioscan_xla: environmental DNA sequences in, vectors and names out.

`run_embedding_pipeline` is the whole embedding job as one function; the commands are
`python -m bioscan_xla.embed` and `python -m bioscan_xla.search`. Importing the package also
registers its LanceDB embedding function, so that `table.search("ACGT...")` works.
"""

import os
from importlib.metadata import PackageNotFoundError, version

# Where torch_xla is installed, transformers would start its runtime just to look whether it is
# wanted. Only runtime.py starts it.
os.environ.setdefault("USE_TORCH_XLA", "0")

try:
    __version__ = version("bioscan_xla")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+source"

from .table import embedding_function as _embedding_function  # noqa: F401


def run_embedding_pipeline(*args, **kwargs):
    """Embed sequences into a LanceDB table; see `bioscan_xla.embed.run_embedding_pipeline`."""
    # Imported at the call: `import bioscan_xla` loads no model code and touches no device.
    from .embed import run_embedding_pipeline as run

    return run(*args, **kwargs)


def run_finetuning_pipeline(*args, **kwargs):
    """Fine-tune adapter and heads; see `bioscan_xla.finetune.run_finetuning_pipeline`."""
    from .finetune import run_finetuning_pipeline as run

    return run(*args, **kwargs)


def load_classifier(folder, device="auto", dtype=None):
    """Load a fine-tuned model; see `bioscan_xla.training.classifier.load_classifier`."""
    from .encode.runtime import open_device
    from .training.classifier import load_classifier as load

    return load(folder, open_device(device, dtype))


__all__ = [
    "__version__",
    "load_classifier",
    "run_embedding_pipeline",
    "run_finetuning_pipeline",
]
