"""bioscan_xla: environmental DNA sequences in, vectors and names out.

`run_embedding_pipeline` is the whole embedding job as one function; the commands are
`python -m bioscan_xla.embed` and `python -m bioscan_xla.search`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bioscan_xla")
except PackageNotFoundError:  # used from a source tree that was never installed
    __version__ = "0+source"


def run_embedding_pipeline(*args, **kwargs):
    """Embed sequences into a LanceDB table; see `bioscan_xla.embed.run_embedding_pipeline`."""
    # Imported at the call: `import bioscan_xla` stays instant and touches no device.
    from .embed import run_embedding_pipeline as run

    return run(*args, **kwargs)


__all__ = ["__version__", "run_embedding_pipeline"]
