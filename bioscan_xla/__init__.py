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

from . import embedding_function as _embedding_function  # noqa: F401


def run_embedding_pipeline(*args, **kwargs):
    """Embed sequences into a LanceDB table; see `bioscan_xla.embed.run_embedding_pipeline`."""
    # Imported at the call: `import bioscan_xla` loads no model code and touches no device.
    from .embed import run_embedding_pipeline as run

    return run(*args, **kwargs)


__all__ = ["__version__", "run_embedding_pipeline"]
