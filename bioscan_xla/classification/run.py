"""A classification job from files to files.

Input: a config. Output: the folder of results and a summary. Invariants: a record is named once,
however often the job is killed and run again; whatever ends the run, results so far are kept.
"""

import json
import logging
import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
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
from ..reads.inputs import name_inputs, source_key
from ..reads.lineages import RANKS
from ..reads.raw import ReadOptions
from ..reads.records import Chunk, read_chunks
from ..stopping import stop_on_signal
from ..table.rejections import Rejections
from .calibration import LENGTH_BANDS_BP, Calibration, calibrate
from .darwin_core import read_known_taxa
from .heads import check_names, load_heads
from .journal import Journal
from .leave_out import kept_trials
from .naming import Namer
from .record import make_records
from .reference import Reference, load_reference
from .results import read_sampling, write_page, write_results
from .vectors import cache_folder, prepare_vectors

if TYPE_CHECKING:
    from ..encode.encoder import Encoder

log = logging.getLogger(__name__)

_CHUNK_ROWS = 512
_ENOUGH_TRIALS = 500


def classify(config: ClassifyConfig, command: str | None = None) -> dict[str, Any]:
    """Run a config.

    Args:
        config: options.
        command: for run.json.

    Returns:
        What run.json holds; see `run_classification_pipeline`.
    """
    started = time.monotonic()
    names, failures = name_inputs(config.input)
    sampling = read_sampling(config)
    known_taxa = read_known_taxa(config.known_taxa) if config.known_taxa else {}
    heads = load_heads(config.model or "") if config.method != "neighbours" else None
    reference = load_reference(
        config.reference,
        table=config.reference_table,
        name=config.reference_name,
        version=config.reference_version,
        columns=config.reference_columns,
        header_taxonomy=config.header_taxonomy,
        heads=heads,
    )
    if heads and reference.ids:
        check_names(heads, reference.lineages, config.model or "", reference.name)
    encoder, reference = prepare_vectors(config, reference)
    namer = Namer(
        reference,
        num_candidates=config.num_candidates,
        candidates=config.candidates,
        min_coverage=config.min_coverage,
        method=config.method,
        heads=heads,
    )
    journal = Journal(config.output, _settings(config, reference, encoder))
    trials = None
    if config.method != "heads":  # left-out references tell nothing of heads that learnt them
        trials = kept_trials(namer, config.num_trials, cache_folder(config))
    calibration = calibrate(
        trials,
        novel_share=config.novel_share,
        precision=config.precision,
        fixed_thresholds=config.threshold,
    )
    if trials is not None and calibration.num_trials < _ENOUGH_TRIALS:
        log.warning(
            "confidence rests on %d left-out references only; below %d the precision of %g may not "
            "hold. Raise --num-trials, or take a larger reference",
            calibration.num_trials,
            _ENOUGH_TRIALS,
            config.precision,
        )
    told = {rank: round(float(t), 3) for rank, t in zip(RANKS, calibration.thresholds, strict=True)}
    log.info("least confidence by rank: %s", ", ".join(f"{r} {t}" for r, t in told.items()))
    tally, broken = _name_input(config, names, namer, encoder, calibration, journal)
    failures += [broken] if broken else []  # the records before the damage are named and written
    result: dict[str, Any] = {
        "program": f"bioscan_xla {__version__}",
        "command": command,
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
        "thresholds": told,
        "novelty_trust": _trust_by_band(calibration),
        "versions": _versions(),
        "read": tally["read"],
        "rejected": {k[9:]: n for k, n in tally.items() if k.startswith("rejected:")},
        "interrupted": tally["interrupted"] or None,
    }
    if not tally["interrupted"]:
        result |= write_results(config, journal, reference, sampling, known_taxa, result)
        write_page(config.output, sampling, result)
    result["seconds"] = round(time.monotonic() - started, 1)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (Path(config.output) / "run.json").write_text(text, encoding="utf-8")
    if failures:
        raise InputError("; ".join(map(str, failures)))
    return result


def method_text(config: ClassifyConfig, encoder: "Encoder | None") -> str:
    """How names are given, in a line."""
    if config.method == "heads":
        return (
            f"bioscan_xla {__version__}: heads of a fine-tuned model, best path in the tree of "
            "lineages, confidence not calibrated"
        )
    ways = "shared 8-mers" if encoder is None else "vectors and shared 8-mers"
    if encoder is not None and config.candidates != "both":
        ways = "vectors" if config.candidates == "vector" else "shared 8-mers"
    decided = " and heads of a fine-tuned model" if config.method == "both" else ""
    return (
        f"bioscan_xla {__version__}: candidates by {ways}, free-end-gap alignment{decided}, "
        "best path in the tree of reference lineages, calibrated confidence"
    )


def _settings(
    config: ClassifyConfig, reference: Reference, encoder: "Encoder | None"
) -> dict[str, str]:
    """Everything that determines the content of a row, as text."""
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
    told |= {
        "reference": reference.content_hash,
        "program": __version__.split("+")[0],
    }
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
    done = _done_by_path(journal, rejections, names)
    already = sum(int(rows.sum()) for rows in done.values())
    if already:
        log.info("resuming: %d records are done already", already)
    chunks = read_chunks(sources, reading, schema, done=done, known_ids=journal.ids(), names=names)
    tally: Counter = Counter(interrupted=0, read=already)
    total = count_rows(sources)
    logging_redirect = logging_redirect_tqdm()
    bar = tqdm(total=total, initial=already, unit="seq", disable=None)
    with stop_on_signal() as stop, logging_redirect, bar:
        try:
            for chunk in chunks:
                journal.append(_name_chunk(config, chunk, namer, encoder, calibration))
                rejections.add(chunk.rejected)
                tally["read"] += chunk.num_rows
                tally.update(f"rejected:{item.code.value}" for item in chunk.rejected)
                bar.update(chunk.num_rows)
                if stop.event.is_set():
                    tally["interrupted"] = stop.signal_number or 0
                    break
        except InputError as error:
            return tally, error
    return tally, None


def _done_by_path(
    journal: Journal, rejections: Rejections, names: Mapping[str, str]
) -> dict[str, np.ndarray]:
    done = {source_key(source): rows for source, rows in journal.done().items()}
    rejected: dict[str, list[int]] = {}
    for row in rejections.done().select(["source", "row"]).to_pylist():
        rejected.setdefault(source_key(row["source"]), []).append(row["row"])
    result = {}
    for path, name in names.items():
        rows = done.get(source_key(name), np.zeros(0, bool))
        more = rejected.get(source_key(name), [])
        bitmap = np.zeros(max(len(rows), max(more, default=-1) + 1), bool)
        bitmap[: len(rows)] = rows
        bitmap[more] = True
        result[path] = bitmap
    return result


def _name_chunk(
    config: ClassifyConfig,
    chunk: Chunk,
    namer: Namer,
    encoder: "Encoder | None",
    calibration: Calibration,
) -> pa.Table:
    """Name the records of a chunk; equal sequences once."""
    distinct = list(dict.fromkeys(chunk.sequences))
    oriented = [namer.orient(sequence, config.strand) for sequence in distinct]
    sequences, strands = [s for s, _ in oriented], [s for _, s in oriented]
    vectors = None
    if encoder is not None and distinct:
        from ..encode.inference import embed_sequences

        vectors = embed_sequences(encoder, sequences)
    named = namer.name_all(sequences, strands, vectors)
    place = {sequence: at for at, sequence in enumerate(distinct)}
    which = [place[sequence] for sequence in chunk.sequences]
    return make_records(
        chunk.ids,
        chunk.source,
        chunk.rows.tolist(),
        [named[at] for at in which],
        None if vectors is None else vectors[which],
        namer.reference,
        calibration,
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
