"""Run by test_train.py in processes of its own: fine-tunes with options given as JSON.

Arguments: JSON of FinetuneConfig fields. With KILL_AT=n in the environment the process kills
itself with -9 at update n, in the middle of an epoch; with TERM_AT=n it gets SIGTERM then. With
HOST=k/n it believes to be host k of a TPU slice of n, each of which has a mesh of its own here:
whatever hosts have to agree on is real, only the reduction of gradients between them is not.
With PUSHED=file in the environment an upload writes a line there instead.
Prints the result as one JSON line.
"""

import json
import os
import signal
import sys

from huggingface_hub import HfApi

from bioscan_xla.finetune import choose_backend
from bioscan_xla.options import FinetuneConfig


def main():
    config = FinetuneConfig(**json.loads(sys.argv[1]))
    choose_backend(config.device)
    from bioscan_xla.training import loop as training_loop
    from bioscan_xla.training import run as train

    if host := os.environ.get("HOST"):
        import torch_xla.runtime as xr

        index, count = map(int, host.split("/"))
        xr.process_index, xr.process_count = lambda: index, lambda: count
    for name, number in (("KILL_AT", signal.SIGKILL), ("TERM_AT", signal.SIGTERM)):
        if update := int(os.environ.get(name, "0")):
            send_at(training_loop.Loop, update, number)
    if pushed := os.environ.get("PUSHED"):
        HfApi.create_repo = lambda *_, **__: None
        HfApi.upload_folder = lambda _, repo_id, **__: upload_into(pushed, repo_id)
    print(json.dumps(train.finetune(config)))


def upload_into(path, repository):
    with open(path, "a") as file:
        file.write(f"{repository}\n")


def send_at(loop, update, number):
    begin = loop._update

    def until(self, *arguments):
        if self.cursor.updates >= update:
            os.kill(os.getpid(), number)
        begin(self, *arguments)

    loop._update = until


if __name__ == "__main__":
    main()
