"""Run by test_train.py in processes of its own: fine-tunes with options given as JSON.

Arguments: JSON of FinetuneConfig fields. With KILL_AT=n in the environment the process kills
itself with -9 at update n, in the middle of an epoch. Prints the result as one JSON line.
"""

import json
import os
import signal
import sys

from bioscan_xla.finetune import choose_backend
from bioscan_xla.training_config import FinetuneConfig


def main():
    config = FinetuneConfig(**json.loads(sys.argv[1]))
    choose_backend(config.device)
    from bioscan_xla import train, training_loop

    kill_at = int(os.environ.get("KILL_AT", "0"))
    if kill_at:
        step = training_loop.Loop._step

        def until(self, *arguments):
            if self.cursor.updates >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, *arguments)

        training_loop.Loop._step = until
    print(json.dumps(train.finetune(config)))


if __name__ == "__main__":
    main()
