"""Will it fit, and how fast can it be: `python -m bioscan_xla.plan embed --topology v5e-8`.

Input: options of a run. Output: a table or JSON. Traces the programs that the run would compile,
compiles them with Google's TPU compiler on a machine without a TPU, and sums up its figures.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from .cli import run_command
from .options import EmbedConfig, PlanEmbeddingConfig, PlanFinetuningConfig

_USAGE = """usage: python -m bioscan_xla.plan embed|finetune [--topology v5e-8] [--json] [OPTIONS]

Compile the programs of a run for a TPU; no TPU is needed. OPTIONS are those of
python -m bioscan_xla.embed, or of launch/finetune.py; `plan embed --help` lists them."""


def _work(config: PlanEmbeddingConfig | PlanFinetuningConfig) -> int:
    from .planning.compiler import check_compiler, find_topology

    check_compiler()
    topology = find_topology(config.topology)
    from .planning.estimate import describe
    from .planning.programs import plan_embedding, plan_finetuning

    if isinstance(config, EmbedConfig):
        result = plan_embedding(config, topology)
    else:
        result = plan_finetuning(config, topology)
    print(json.dumps(result, indent=1) if config.json else describe(result))
    return 0 if result["fits"] else 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; exit status 0 if all programs fit, 1 on an error, 3 if not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    configs: dict[str, Any] = {"embed": PlanEmbeddingConfig, "finetune": PlanFinetuningConfig}
    job, rest = (words[0], words[1:]) if words else ("", [])
    if job not in configs:
        asked = {"-h", "--help"} & set(words)
        print(_USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 1
    return run_command(configs[job], _work, rest, f"python -m bioscan_xla.plan {job}")


if __name__ == "__main__":
    sys.exit(main())
