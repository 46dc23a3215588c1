"""Serve a model over HTTP: `python -m bioscan_xla.serve --model FOLDER --port 8000`.

Input: options. Output: vectors, names and neighbours for whoever asks, until a signal.
Invariants: what was accepted is answered before the server ends.
"""

import sys
from collections.abc import Sequence

from .cli import run_command
from .errors import ConfigError
from .options import ServeConfig


def _work(config: ServeConfig) -> int:
    try:
        from .serving.run import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bioscan_xla"):
            raise
        raise ConfigError(
            f"{error.name} is not installed; pip install 'bioscan_xla[serve]'"
        ) from error
    return serve(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(
        ServeConfig,
        _work,
        arguments,
        "python -m bioscan_xla.serve",
        on_second_signal="stopped at once",
    )


if __name__ == "__main__":
    sys.exit(main())
