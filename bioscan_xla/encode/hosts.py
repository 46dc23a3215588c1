"""Coordination, over gloo, of the hosts of one TPU slice that train together.

Input: flags, options and folders of each host. Output: values that all hosts share.
Invariants: every host runs the same program on the same batch, of which each TPU takes its rows, so
all have the same weights and figures. Only the first host's folder is kept; the others write the
same files into a temporary folder, because a host that skipped work would leave the rest waiting.
With a single host nothing here has any effect.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed

from ..errors import ConfigError, DeviceError
from .runtime import Device


def in_any(device: Device, flags: list[bool]) -> list[bool]:
    """Each flag: whether it is set on any host; all hosts must ask at the same step."""
    if device.process_count == 1:
        return flags
    values = torch.tensor(flags, dtype=torch.uint8)
    with _all_answer():
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values.bool().tolist()


def check_same(device: Device, what: str, *parts: str) -> None:
    """Refuse to train if hosts differ: each would compute its part of a different batch.

    Raises:
        ConfigError: on every host; names those whose `parts` differ from the first host's.
    """
    if device.process_count == 1:
        return
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    found: list[str] = [""] * device.process_count
    with _all_answer():
        distributed.all_gather_object(found, digest)
    if others := [str(host) for host, theirs in enumerate(found) if theirs != found[0]]:
        raise ConfigError(
            f"{what}: host {', '.join(others)} differs from host 0; give all hosts of the "
            "slice the same command and the same files"
        )


@contextlib.contextmanager
def own_folder(device: Device, folder: str) -> Iterator[str]:
    """The folder on the first host; on the others a temporary one with the first's checkpoints.

    Only the first host's disk must be permanent: it sends its checkpoints to the others.
    """
    if device.process_count == 1:
        yield folder
        return
    with contextlib.ExitStack() as stack:
        own = folder
        if device.process_index:
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="bioscan-"))
        names = _last_checkpoints(Path(folder)) if not device.process_index else []
        count = [len(names)]
        with _all_answer():
            distributed.broadcast_object_list(count)
        for number in range(count[0]):
            sent: list[tuple[str, bytes]] = [("", b"")]
            if names:
                sent = [(names[number], Path(folder, names[number]).read_bytes())]
            with _all_answer():
                distributed.broadcast_object_list(sent)
            if device.process_index:
                target = Path(own, sent[0][0])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(sent[0][1])
        yield own


@contextlib.contextmanager
def _all_answer() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(
            "another host of the TPU slice stopped or does not respond; its own log says why. "
            f"Start all hosts again to resume from the last checkpoint ({error})"
        ) from error


def _last_checkpoints(folder: Path) -> list[str]:
    """Files of the newest checkpoint and of the best one."""
    checkpoints = folder / "checkpoints"
    wanted = [*sorted(checkpoints.glob("step_*"))[-1:], checkpoints / "best"]
    paths = [path for one in wanted for path in sorted(one.rglob("*")) if path.is_file()]
    return [str(path.relative_to(folder)) for path in paths]
