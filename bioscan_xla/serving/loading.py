"""Models loaded and made ready, while others may be serving.

Input: the server's options and which model is wanted. Output: a `Version`.
Invariants: a version is returned only once every program it needs is compiled; what touches the
device is done by the thread that owns it.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..encode.encoder import Encoder, load_encoder, transformed_alike
from ..encode.fingerprint import compare, describe, identity
from ..encode.inference import embed_sequences
from ..encode.model_files import split_finetuned
from ..encode.runtime import Device, open_device
from ..errors import InputError, ModelError, TableError
from ..options import DEFAULT_MODEL, ClassifyConfig, ServeConfig
from ..reads.inputs import expand_inputs
from .device import SharedEncoder, share
from .token_queue import TokenQueue
from .versions import Version

if TYPE_CHECKING:
    from ..classification.opening import Opened
    from .reference_table import ReferenceTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A model to load.

    Attributes:
        name: what clients call it; None takes the last part of its folder or id.
        model: folder or id; None is the one that made the reference table.
        adapter: folder of a LoRA adapter.
        reference: labelled sequences.
    """

    name: str | None
    model: str | None
    adapter: str | None
    reference: str | None


def wanted_at_start(config: ServeConfig) -> Sequence[Wanted]:
    """The models of the options, the default first."""
    first = Wanted(config.name, config.model, config.adapter, config.reference)
    return [first, *(Wanted(name, at, None, config.reference) for name, at in config.also.items())]


def load_version(config: ServeConfig, wanted: Wanted, queue: TokenQueue) -> Version:
    """Load a model, compile its programs, and ready its references.

    Raises:
        BioscanError: something cannot be loaded; what is being served is not touched.
    """
    started = time.monotonic()
    table = _open_table(config, wanted.reference)
    made_by = table.made_by if table is not None else {}
    encoder = _load_encoder(config, wanted, made_by, queue)
    if config.method == "neighbours":  # heads read vectors as they are
        encoder = transformed_alike(encoder, made_by)
    shared = share(encoder, queue)
    warm(shared)
    name = wanted.name or _last_part(wanted, encoder)
    version = Version(
        name,
        f"{name}@{identity(encoder.fingerprint)}",
        int(time.time()),
        encoder,
        shared,
        _open_naming(config, wanted, shared),
        _check_table(table, wanted.reference, encoder),
    )
    log.info("%s is ready after %.1f s", version.id, time.monotonic() - started)
    return version


def warm(encoder: SharedEncoder) -> None:
    """Compute a short and a long sequence: every shape of batch, so that nothing compiles later."""
    embed_sequences(encoder, ["ACGT" * 5])
    embed_sequences(encoder, ["ACGTAT" * (encoder.max_tokens - 1)])


def _last_part(wanted: Wanted, encoder: Encoder) -> str:
    name = wanted.adapter or wanted.model or encoder.fingerprint["model"]
    return Path(name).resolve().name if Path(name).is_dir() else name.rsplit("/", 1)[-1]


def _open_table(config: ServeConfig, reference: str | None) -> "ReferenceTable | None":
    """The table of a reference; None for a file of sequences."""
    from ..classification.reference import is_table
    from .reference_table import ReferenceTable

    if not reference:
        return None
    if not is_table(reference):
        expand_inputs(reference)  # reports what is not there before a model is loaded
        return None
    return ReferenceTable(reference, config.reference_table)


def _load_encoder(
    config: ServeConfig, wanted: Wanted, made_by: dict[str, str], queue: TokenQueue
) -> Encoder:
    dtype = config.dtype or made_by.get("dtype")
    device: Device = queue.call(lambda: open_device(config.device, dtype))
    if not wanted.model and not wanted.adapter:
        if not made_by:
            raise ModelError("the reference names no model; pass --model FOLDER or ID")
        from ..table.embedding_function import load_again

        return load_again(made_by, device, on_device=queue.call)
    model, revision, adapter = wanted.model or DEFAULT_MODEL, config.revision, wanted.adapter
    if not adapter:
        model, commit, adapter = split_finetuned(model)
        revision = commit or revision
    return load_encoder(
        model,
        device=device,
        revision=revision,
        adapter=adapter,
        pooling=config.pooling,
        layer=config.layer,
        overlap_tokens=config.overlap_tokens,
        frames=config.frames,
        strands=config.strands,
        on_device=queue.call,
    )


def _open_naming(config: ServeConfig, wanted: Wanted, encoder: SharedEncoder) -> "Opened | str":
    if not wanted.reference and config.method not in ("heads", "argmax"):
        return "the server has no reference; start it with --reference"
    from ..classification.opening import Opened, calibrate_namer, open_namer
    from ..classification.reference import is_table

    options = ClassifyConfig(
        reference=wanted.reference or "",
        reference_table=config.reference_table,
        header_taxonomy=config.header_taxonomy,
        model=wanted.adapter or wanted.model,
        method=config.method,
        num_trials=config.num_trials,
        output=config.jobs_folder,
    )
    try:
        used, namer = open_namer(options, encoder)
    except (InputError, TableError) as error:
        if not wanted.reference or not is_table(wanted.reference):
            raise
        log.warning("no /v1/classify: %s", error)  # /v1/search needs no lineages
        return f"the reference cannot name sequences: {error}"
    return Opened(options, used, namer, calibrate_namer(options, namer))


def _check_table(
    table: "ReferenceTable | None", reference: str | None, encoder: Encoder
) -> "ReferenceTable | str":
    if table is None and reference:
        return f"{reference} is a file; /v1/search needs a database made by embed"
    if table is None:
        return "the server has no reference database; start it with --reference DB"
    made_by = table.made_by
    different = compare(made_by, encoder.fingerprint).different
    if not made_by or different:
        lines = describe(different, made_by, encoder.fingerprint, ("the table", "the server"))
        reason = "the reference table was made by another model:\n" + "\n".join(lines)
        log.warning("no /v1/search: %s", reason)
        return "the reference table was made by another model"
    return table
