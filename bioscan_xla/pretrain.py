"""Pre-train a small encoder: `python -m bioscan_xla.pretrain --input FILES --output FOLDER`.

Input: unlabelled sequences. Output: a model folder in the Hugging Face format, for `--model`, and
one line of JSON.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from .cli import run_command
from .options import PretrainConfig


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run a config; see `training.pretraining.pretrain`."""
    from .reads.inputs import expand_inputs

    expand_inputs(config.input)  # reports missing files before the heavy imports
    from .training.pretraining import pretrain as run

    return run(config)


def _work(config: PretrainConfig) -> int:
    print(json.dumps(pretrain(config)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(
        PretrainConfig,
        _work,
        arguments,
        "python -m bioscan_xla.pretrain",
        on_second_signal="stopped; run the same command to resume from the last checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main())
