"""A classification job from files to files.

Input: a config. Output: the folder of results and a summary. Invariants: a record is named once,
however often the job is killed and run again; whatever ends the run, results so far are kept.
"""

import functools
import json
import logging
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .. import __version__
from ..errors import InputError
from ..options import ClassifyConfig
from ..reads.files import count_rows, metadata_schema
from ..reads.inputs import changed_files, name_inputs, source_key
from ..reads.lineages import RANKS
from ..reads.raw import ReadOptions
from ..reads.records import Chunk, read_chunks
from ..reads.shares import by_source, mark
from ..stopping import Stop, stop_on_signal
from ..table.rejections import Rejections
from .calibration import LENGTH_BANDS_BP, Calibration
from .darwin_core import read_known_taxa
from .heads import Heads
from .journal import Journal, check_options
from .leave_out import RULES
from .naming import Namer
from .opening import Opened, calibrate_namer, name_sequences, open_namer, tell_thresholds
from .record import make_records
from .reference import Reference
from .results import read_sampling, write_page, write_results

if TYPE_CHECKING:
    from ..encode.encoder import Encoder

log = logging.getLogger(__name__)

_CHUNK_ROWS = 512


def classify(
    config: ClassifyConfig,
    command: str | None = None,
    *,
    opened: Opened | None = None,
    stop: Stop | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Run a config.

    Args:
        config: options.
        command: for run.json.
        opened: what names sequences, where it is loaded already.
        stop: what ends the run early; by default a signal.
        on_progress: called with the records that are done, and all of them where that is known;
            by default a bar shows them.

    Returns:
        What run.json holds; see `run_classification_pipeline`.
    """
    started = time.monotonic()
    check_options(config.output, _option_settings(config))
    names, failures = name_inputs(config.input)
    sampling = read_sampling(config)
    known_taxa = read_known_taxa(config.known_taxa) if config.known_taxa else {}
    encoder, namer = (opened.encoder, opened.namer) if opened else open_namer(config)
    reference = namer.reference
    settings = _settings(config, reference, encoder, namer.heads)
    sources = None if failures else set(names.values())  # a file that is away is told below
    with Journal(config.output, settings, sources) as journal:
        calibration = opened.calibration if opened else calibrate_namer(config, namer)
        tally, broken = _name_input(
            config, names, namer, encoder, calibration, journal, stop, on_progress
        )
        # The records before the damage are named and written.
        failures += [broken] if broken else []
        result: dict[str, Any] = {"program": f"bioscan_xla {__version__}", "command": command}
        result |= _describe(config, reference, encoder, calibration, tally)
        if not tally["interrupted"]:
            if sampling is not None:
                sampling = replace(sampling, row_of=sampling.counts.match(journal.records()))
            result |= write_results(config, journal, reference, sampling, known_taxa, result)
            write_page(config.output, sampling, result)
        result["seconds"] = round(time.monotonic() - started, 1)
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        (Path(config.output) / "run.json").write_text(text, encoding="utf-8")
    if failures:
        raise InputError("; ".join(map(str, failures)))
    return result


def _describe(
    config: ClassifyConfig,
    reference: Reference,
    encoder: "Encoder | None",
    calibration: Calibration,
    tally: Counter,
) -> dict[str, Any]:
    """What run.json says of a run before its results."""
    return {
        "options": asdict(config),
        "reference": {
            "name": reference.name,
            "version": reference.version,
            "content_hash": reference.content_hash,
            "sequences": len(reference.ids),
            "left_out": reference.num_left_out,
        },
        "model": dict(encoder.fingerprint) if encoder else None,
        "method": method_text(config, encoder),
        "calibration_trials": calibration.num_trials,
        "few_trials": calibration.has_few_trials,
        "heads_not_calibrated": config.method == "both"
        and calibration.num_trials > 0
        and not calibration.has_heads,
        "untested_ranks": [RANKS[rank] for rank in calibration.untested],
        "thresholds": tell_thresholds(calibration),
        "novelty_trust": _trust_by_band(calibration),
        "versions": _versions(),
        "read": tally["read"],
        "rejected": {k[9:]: n for k, n in tally.items() if k.startswith("rejected:")},
        "interrupted": tally["interrupted"] or None,
    }


def method_text(config: ClassifyConfig, encoder: "Encoder | None") -> str:
    """How names are given, in a line."""
    if config.method in ("heads", "argmax"):
        how = "best path in the tree of lineages" if config.method == "heads" else "each by itself"
        return f"bioscan_xla {__version__}: heads of a fine-tuned model, {how}"
    ways = "shared 8-mers" if encoder is None else "vectors and shared 8-mers"
    if encoder is not None and config.candidates != "both":
        ways = "vectors" if config.candidates == "vector" else "shared 8-mers"
    decided = " and heads of a fine-tuned model" if config.method == "both" else ""
    return (
        f"bioscan_xla {__version__}: candidates by {ways}, free-end-gap alignment{decided}, "
        "best path in the tree of reference lineages, calibrated confidence"
    )


def _option_settings(config: ClassifyConfig) -> dict[str, str]:
    """What determines the content of a row and is known before references and model are read."""
    fields = (
        "method",
        "candidates",
        "num_candidates",
        "strand",
        "min_coverage",
        "precision",
        "threshold",
        "novel_share",
        "num_trials",
        "min_length_bp",
        "max_n_fraction",
    )
    told = {name: str(getattr(config, name)) for name in fields}
    told |= {"program": __version__.split("+")[0], "rules of naming": str(RULES)}
    if config.columns:
        told["columns"] = str(sorted(config.columns.items()))
    return told


def _settings(
    config: ClassifyConfig, reference: Reference, encoder: "Encoder | None", heads: Heads | None
) -> dict[str, str]:
    """Everything that determines the content of a row, as text."""
    told = _option_settings(config) | {"reference": reference.content_hash}
    if heads is not None:
        told["heads"] = heads.content_hash
    for name, value in (encoder.fingerprint if encoder else {}).items():
        if name not in ("model", "revision", "adapter", "version"):  # its location
            told[f"model {name}"] = value
    return told


def _name_input(
    config: ClassifyConfig,
    names: Mapping[str, str],
    namer: Namer,
    encoder: "Encoder | None",
    calibration: Calibration,
    journal: Journal,
    stop: Stop | None,
    on_progress: Callable[[int, int | None], None] | None,
) -> tuple[Counter, InputError | None]:
    """Name all records that are not named yet; the error is that of files not read in full."""
    reading = ReadOptions(
        columns=config.columns,
        min_length_bp=config.min_length_bp,
        max_n_fraction=config.max_n_fraction,
        chunk_rows=_CHUNK_ROWS,
    )
    sources = list(names)
    schema = metadata_schema(sources, reading)
    rule = f"{sorted(config.columns.items())} {config.min_length_bp} {config.max_n_fraction}"
    rejections = Rejections(config.output, "embeddings", rule=rule, sources=set(names.values()))
    rejected = rejections.done()
    done = _done_by_path(journal, rejected, names)
    already = sum(int(rows.sum()) for rows in done.values())
    for path in changed_files(names, journal.done().keys()):
        log.warning(
            "%s changed since it was named: it is read again, and records whose ids have a name in "
            "%s keep it and are rejected. To name the changed file anew, pass another --output",
            path,
            config.output,
        )
    if already:
        log.info("resuming: %d records are done already", already)
    chunks = read_chunks(sources, reading, schema, done=done, known_ids=journal.ids(), names=names)
    tally: Counter = Counter(interrupted=0, read=already)
    tally.update(_rejected_before(rejected, names))
    total = count_rows(sources)
    hidden = None if on_progress is None else True
    bar = tqdm(total=total, initial=already, unit="seq", disable=hidden)
    redirect = logging_redirect_tqdm() if on_progress is None else nullcontext()
    with nullcontext(stop) if stop else stop_on_signal() as stop, redirect, bar:
        try:
            for chunk in chunks:
                journal.append(_name_chunk(config, chunk, namer, encoder, calibration))
                rejections.add(chunk.rejected)
                tally["read"] += chunk.num_rows
                tally.update(f"rejected:{item.code.value}" for item in chunk.rejected)
                bar.update(chunk.num_rows)
                if on_progress is not None:
                    on_progress(tally["read"], total)
                if stop.event.is_set():
                    tally["interrupted"] = stop.signal_number or 0
                    break
        except InputError as error:
            return tally, error
    return tally, None


def _done_by_path(
    journal: Journal, rejected: pa.Table, names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    parts = {source_key(source): [rows.nonzero()[0]] for source, rows in journal.done().items()}
    for batch in rejected.to_batches():
        for source, rows in by_source(batch):
            parts.setdefault(source_key(source), []).append(rows)
    return {path: mark(parts.get(source_key(name), [])) for path, name in names.items()}


def _rejected_before(rejected: pa.Table, names: Mapping[str, str]) -> Counter:
    """How many records of these files were rejected by earlier runs, by reason."""
    ours = set(map(source_key, names.values()))
    codes = zip(rejected["source"].to_pylist(), rejected["code"].to_pylist(), strict=True)
    return Counter(f"rejected:{code}" for source, code in codes if source_key(source) in ours)


def _name_chunk(
    config: ClassifyConfig,
    chunk: Chunk,
    namer: Namer,
    encoder: "Encoder | None",
    calibration: Calibration,
) -> pa.Table:
    """Name the records of a chunk."""
    embed = None
    if encoder is not None:
        from ..encode.inference import embed_sequences

        embed = functools.partial(embed_sequences, encoder)
    named, vectors = name_sequences(namer, chunk.sequences, config.strand, embed)
    return make_records(
        chunk.ids, chunk.source, chunk.rows.tolist(), named, vectors, namer.reference, calibration
    )


def _trust_by_band(calibration: Calibration) -> dict[str, float | None]:
    edges = [0, *LENGTH_BANDS_BP]
    bands = [f"{low}-{high} bp" for low, high in zip(edges, LENGTH_BANDS_BP, strict=False)]
    bands.append(f"over {LENGTH_BANDS_BP[-1]} bp")
    values = calibration.novelty_trust.tolist()
    return {
        band: None if value != value else round(value, 3)
        for band, value in zip(bands, values, strict=True)
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("numpy", "pyarrow", "pyopal", "scikit-learn", "torch")
    return {"python": platform.python_version(), "platform": sys.platform} | {
        name: version(name) for name in names
    }
