"""An embedding run, from a config to a table.

Input: a config. Output: the table, `rejected.parquet` beside it, and the figures of the run.
Invariants: after any interruption, running it again resumes where the table ends.
"""

import functools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..encode import runtime
from ..encode.encoder import SAMPLE, Encoder, load_encoder, with_transform
from ..encode.model_files import resolve_base
from ..errors import ConfigError, InputError
from ..options import EmbedConfig
from ..reads.cleaning import Code
from ..reads.files import count_rows, metadata_schema
from ..reads.inputs import is_remote, name_inputs
from ..reads.raw import ReadOptions, read_options
from ..reads.records import join_failures, read_chunks, stop_at
from ..reads.shares import Share
from ..stopping import Stop, stop_on_signal
from ..table.mirror import Mirror, check_mirror, restore
from ..table.neighbours import recorded_revision, recorded_schema, recorded_transform
from ..table.rows import table_schema
from ..table.store import Store
from .pipeline import run
from .progress import Progress
from .threads import Outcome
from .tracking import Tracker

if TYPE_CHECKING:
    from .cluster import Workers

log = logging.getLogger("bioscan_xla.embed")

# Rows read at a time: enough to sort by length and fill batches, few enough to keep in memory.
_CHUNK_ROWS = {"cpu": 1024, "cuda": 8192, "xla": 8192}


def embed(
    config: EmbedConfig,
    commit_by_time: bool = True,
    *,
    encoder: Encoder | None = None,
    stop: Stop | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Run a config; returns what `bioscan_xla.embed.run_embedding_pipeline` documents.

    The key `failure` is added: the error for files that could not be read in full, or None.

    Args:
        config: options.
        commit_by_time: commit at least every `commit_minutes`.
        encoder: the model, where it is loaded already; options that say which are not looked at.
        stop: what ends the run early; by default a signal.
        on_progress: called with the records that are done, and all of them where that is known;
            by default a bar shows them.
    """
    if encoder is not None:

        def given(*_: Any, transform: str | None, **__: Any) -> Encoder:
            return with_transform(encoder, transform)  # that of the table, if it has one

        return _embed(config, encoder.device.kind, given, commit_by_time, stop, on_progress)
    name, revision = resolve_base(config.model, config.revision, config.adapter)
    config = replace(config, model=name, revision=revision)
    with _engine(config) as (kind, load):
        return _embed(config, kind, load, commit_by_time, stop, on_progress)


@contextmanager
def _engine(config: EmbedConfig) -> Iterator[tuple[str, Callable[..., "Encoder | Workers"]]]:
    """Kind of device, and what loads a model: `load_encoder` here, or on a cluster's workers."""
    if config.engine == "local":
        device = runtime.open_device(config.device, config.dtype)
        yield device.kind, functools.partial(load_encoder, device=device)
        return
    try:
        from .cluster import Workers
    except ImportError as error:
        raise ConfigError(
            f"engine is ray, but it cannot be imported ({error}); pip install 'bioscan_xla[ray]'"
        ) from error
    name = "cpu" if (config.dtype, config.device) == ("int8", "auto") else config.device
    workers = Workers.connect(name, config.dtype, config.workers)
    try:
        yield workers.kind, workers.load
    finally:
        workers.close()


def _embed(
    config: EmbedConfig,
    kind: str,
    load: "Callable[..., Encoder | Workers]",
    commit_by_time: bool,
    stop: Stop | None,
    on_progress: Callable[[int, int | None], None] | None,
) -> dict[str, Any]:
    names, unreadable = name_inputs(config.input)
    sources = list(names)
    reading = read_options(config, min(_CHUNK_ROWS[kind], config.commit_rows))
    share = Share(config.process_index, config.process_count)
    if unreadable and share.count > 1:
        raise stop_at(join_failures(unreadable), share)
    mirror = _open_mirror(config)
    schema = metadata_schema(sources, reading, recorded_schema(config.db, config.table))
    revision = config.revision or recorded_revision(config.db, config.table, config.model)
    encoder = load(
        config.model,
        revision=revision,
        adapter=config.adapter,
        pooling=config.pooling,
        layer=config.layer,
        overlap_tokens=config.overlap_tokens,
        frames=config.frames,
        strands=config.strands,
        transform=recorded_transform(config.db, config.table),
        shard_parameters=config.shard_parameters,
        sample=_sample(sources, reading, schema) if config.dtype == "int8" else (),
    )
    store = Store.open(
        config.db,
        config.table,
        table_schema(
            encoder.hidden, config.vector_dtype, schema, config.store_sequences, encoder.fingerprint
        ),
        rule=_rule(reading),
        names=names,
        share=share,
        reshare=config.reshare,
    )
    done = store.done()
    chunks = read_chunks(
        sources,
        reading,
        schema,
        done=done.rows,
        known_ids=store.ids(),
        share=share,
        names=names,
    )
    tracker = Tracker(config.tracker, config.wandb_project, asdict(config), config.db)
    total = count_rows(sources) if config.process_count == 1 else None
    already = sum(int(rows.sum()) for rows in done.rows.values())
    if already:
        log.info("resuming: %d records are done already", already)
    started = time.monotonic()
    embed_chunks = functools.partial(run, encoder) if isinstance(encoder, Encoder) else encoder.run
    progress = Progress(encoder.utilisation, tracker, total, already, on_progress)
    with nullcontext(stop) if stop else stop_on_signal() as stop, progress:
        try:
            outcome = embed_chunks(
                store,
                chunks,
                commit_rows=config.commit_rows,
                commit_seconds=60 * config.commit_minutes if commit_by_time else math.inf,
                max_sequences=config.max_sequences,
                max_errors=config.max_errors,
                stop=stop.event,
                on_progress=progress.update,
                on_commit=mirror.after_commit if mirror else lambda: None,
            )
            if not stop.event.is_set():
                store.finish(config.vector_index)
        finally:
            # Also after an error: what was committed belongs in the copy.
            if mirror:
                mirror.finish()
            tracker.finish()
    failures = [*unreadable, *([outcome.failure] if outcome.failure else [])]
    usable = done.num_usable + outcome.embedded + outcome.rejected[Code.ID_SEEN_BEFORE]
    return _result(outcome, encoder, store, time.monotonic() - started, stop) | {
        "already_done": already,
        "usable": usable,
        "failure": join_failures(failures) if failures else None,
    }


def _sample(sources: list[str], reading: ReadOptions, schema: pa.Schema) -> list[str]:
    """Sequences from the beginning of the input, on which int8 is measured."""
    try:
        chunk = next(read_chunks(sources, reading, schema), None)
    except InputError:  # the run itself reports it
        return []
    return list(chunk.sequences[:SAMPLE]) if chunk else []


def _open_mirror(config: EmbedConfig) -> Mirror | None:
    if config.mirror is None:
        return None
    if is_remote(config.db):
        raise ConfigError(f"mirror needs a local database, but db is {config.db}; remove mirror")
    if Path(config.mirror).resolve() == Path(config.db).resolve():
        raise ConfigError("mirror and db are the same folder; name another for the copy")
    check_mirror(config.db, config.mirror)
    restore(config.mirror, config.db, config.table)
    return Mirror(config.db, config.mirror)


def _rule(reading: ReadOptions) -> str:
    """Everything that decides whether a record is rejected."""
    return json.dumps(
        {
            "columns": dict(sorted(reading.columns.items())),
            "header_taxonomy": reading.header_taxonomy,
            "min_length_bp": reading.min_length_bp,
            "max_n_fraction": reading.max_n_fraction,
        }
    )


def _result(
    outcome: Outcome, encoder: "Encoder | Workers", store: Store, seconds: float, stop: Stop
) -> dict[str, Any]:
    rows = store.count_rows()
    totals = outcome.totals
    return {
        "sequences_processed": outcome.rows_read,
        "embeddings_generated": outcome.embedded,
        "errors": outcome.num_rejected,
        "total_rows": rows,
        "vector_count": rows,
        "avg_vector_length": encoder.hidden,
        "sample_vector_norm": store.sample_norm(),
        "seconds": seconds,
        "sequences_per_second": outcome.embedded / seconds,
        "useful_tokens_per_second": totals.useful_tokens / seconds,
        "useful_token_fraction": totals.useful_fraction,
        "windowed": totals.windowed,
        "distinct": totals.distinct,
        "compiles": encoder.compiles,
        "model_flop_utilisation": encoder.utilisation(totals, seconds),
        "cleaned": dict(outcome.cleaned),
        "rejected": {code.value: count for code, count in _rejected(outcome).items()},
        "interrupted": stop.signal_number,
        "fingerprint": dict(encoder.fingerprint),
    }


def _rejected(outcome: Outcome) -> Counter[Code]:
    return outcome.rejected + Counter({Code.VECTOR_NOT_FINITE: outcome.not_finite})
