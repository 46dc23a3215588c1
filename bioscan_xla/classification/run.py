"""A classification job from files to files.

Input: a config. Output: the folder of results and a summary. Invariants: a record is named once,
however often the job is killed and run again; whatever ends the run, what was named is kept.
"""

import json
import logging
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
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
from .counts import Counts, Sample, read_counts, read_samples
from .darwin_core import read_known_taxa, write_archive
from .formats import write_biom, write_phyloseq, write_texts
from .journal import Journal, read_rows
from .leave_out import kept_trials
from .naming import Namer
from .overview import summarise
from .record import make_records
from .reference import Reference, load_reference
from .report import write_report
from .vectors import cache_folder, prepare_vectors

if TYPE_CHECKING:
    from ..encode.encoder import Encoder

log = logging.getLogger(__name__)

_CHUNK_ROWS = 512


@dataclass(frozen=True)
class Sampling:
    """What belongs to `--table` and `--samples`.

    Attributes:
        counts: with controls left out where that was asked for.
        samples: of the columns of `counts`.
        num_controls: negative controls in the table.
    """

    counts: Counts
    samples: list[Sample]
    num_controls: int


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
    sampling = _read_sampling(config)
    known_taxa = read_known_taxa(config.known_taxa) if config.known_taxa else {}
    reference = load_reference(
        config.reference,
        table=config.reference_table,
        name=config.reference_name,
        version=config.reference_version,
        columns=config.reference_columns,
        header_taxonomy=config.header_taxonomy,
    )
    encoder, reference = prepare_vectors(config, reference)
    namer = Namer(
        reference,
        num_candidates=config.num_candidates,
        candidates=config.candidates,
        min_coverage=config.min_coverage,
    )
    journal = Journal(config.output, _settings(config, reference, encoder))
    trials = kept_trials(namer, config.num_trials, cache_folder(config))
    calibration = calibrate(
        trials,
        novel_share=config.novel_share,
        precision=config.precision,
        fixed_thresholds=config.threshold,
    )
    told = {rank: round(float(t), 3) for rank, t in zip(RANKS, calibration.thresholds, strict=True)}
    log.info("least confidence by rank: %s", ", ".join(f"{r} {t}" for r, t in told.items()))
    tally = _name_input(config, names, namer, encoder, calibration, journal)
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
        result |= _write_results(config, journal, reference, sampling, known_taxa, result)
        counted = (sampling.samples, sampling.counts) if sampling else ((), None)
        overview = summarise(read_rows(config.output), *counted)
        write_report(Path(config.output) / "report.html", overview, result)
    result["seconds"] = round(time.monotonic() - started, 1)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (Path(config.output) / "run.json").write_text(text, encoding="utf-8")
    if failures:
        raise InputError("; ".join(map(str, failures)))
    return result


def method_text(config: ClassifyConfig, encoder: "Encoder | None") -> str:
    """How names are given, in a line."""
    ways = "shared 8-mers" if encoder is None else "vectors and shared 8-mers"
    if encoder is not None and config.candidates == "vector":
        ways = "vectors"
    return (
        f"bioscan_xla {__version__}: candidates by {ways}, free-end-gap alignment, "
        "best path in the tree of reference lineages, calibrated confidence"
    )


def _settings(
    config: ClassifyConfig, reference: Reference, encoder: "Encoder | None"
) -> dict[str, str]:
    """All that decides what a row says, as text."""
    fields = (
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
        if name not in ("model", "revision", "adapter", "version"):  # where it lies
            told[f"model {name}"] = value
    return told


def _read_sampling(config: ClassifyConfig) -> Sampling | None:
    if config.table is None:
        return None
    counts = read_counts(config.table)
    if config.samples:
        samples = read_samples(config.samples, counts.samples)
    else:
        samples = [Sample(name) for name in counts.samples]
    unknown = [s.name for s in samples if config.samples and not s.fields]
    if unknown:
        log.warning("%d samples have no metadata, among them %s", len(unknown), unknown[0])
    controls = [s.is_control for s in samples]
    if any(controls) and config.remove_controls:
        keep = np.flatnonzero(~np.array(controls))
        samples = [samples[at] for at in keep]
        counts = Counts(counts.ids, [s.name for s in samples], counts.matrix[:, keep])
    return Sampling(counts, samples, sum(controls))


def _name_input(
    config: ClassifyConfig,
    names: Mapping[str, str],
    namer: Namer,
    encoder: "Encoder | None",
    calibration: Calibration,
    journal: Journal,
) -> Counter:
    """Name all records that are not named yet."""
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
        for chunk in chunks:
            journal.append(_name_chunk(config, chunk, namer, encoder, calibration))
            rejections.add(chunk.rejected)
            tally["read"] += chunk.num_rows
            tally.update(f"rejected:{item.code.value}" for item in chunk.rejected)
            bar.update(chunk.num_rows)
            if stop.event.is_set():
                tally["interrupted"] = stop.signal_number or 0
                break
    return tally


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


def _completion(sampling: Sampling | None) -> Callable[[pa.Table], pa.Table]:
    """What fills in the counts of some rows."""
    if sampling is None:
        return lambda rows: rows
    places = sampling.counts.rows()
    controls = np.array([sample.is_control for sample in sampling.samples], bool)
    matrix = sampling.counts.matrix
    reads = np.asarray(matrix[:, np.flatnonzero(~controls)].sum(1)).ravel()
    in_controls = np.asarray(matrix[:, np.flatnonzero(controls)].sum(1)).ravel()
    num_samples = np.asarray((matrix[:, np.flatnonzero(~controls)] > 0).sum(1)).ravel()

    def complete(rows: pa.Table) -> pa.Table:
        keys = zip(rows["sequence_id"].to_pylist(), rows["dna_sequence"].to_pylist(), strict=True)
        at = [places.get(name, places.get(sequence)) for name, sequence in keys]
        for column, values in (
            ("reads", reads),
            ("num_samples", num_samples),
            ("control_reads", in_controls),
        ):
            field = rows.schema.field(column)
            cells = [None if place is None else int(values[place]) for place in at]
            number = rows.schema.get_field_index(column)
            rows = rows.set_column(number, field, pa.array(cells, field.type))
        return rows

    return complete


def _write_results(
    config: ClassifyConfig,
    journal: Journal,
    reference: Reference,
    sampling: Sampling | None,
    known_taxa: Mapping[str, str],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    folder = Path(config.output)
    result: dict[str, Any] = {"classified": journal.join(_completion(sampling))}
    label = " ".join(
        part
        for part in (reference.name, reference.version, f"sha256:{reference.content_hash[:16]}")
        if part
    )

    def rows() -> Iterator[dict]:
        columns = [name for name in _columns() if name != "vector"]
        return read_rows(folder, columns)

    write_texts(folder, rows(), label)
    result |= _summarise(rows())
    if sampling is None:
        return result
    counts, samples = sampling.counts, sampling.samples
    matched = result.pop("with_counts")
    if not matched:
        raise InputError(
            f"{config.table}: none of its rows, such as {counts.ids[0]!r}, is a sequence of the "
            "input; the ids must be the same. The names are in classified.parquet"
        )
    if matched < len(counts.ids):
        log.warning(
            "%d rows of %s are no sequence of the input", len(counts.ids) - matched, config.table
        )
    write_biom(folder / "table.biom", rows(), counts, samples, f"bioscan_xla {__version__}")
    write_phyloseq(folder / "phyloseq", rows(), counts, samples)
    result["controls"] = {
        "samples": sampling.num_controls,
        "removed": config.remove_controls,
        "sequences": result.pop("in_controls"),
    }
    if config.samples:
        result["darwin_core"] = write_archive(
            folder / "dwca.zip",
            rows(),
            counts,
            samples,
            method=run["method"],
            reference=label,
            known_taxa=known_taxa,
            target_gene=config.target_gene,
            title=f"DNA-derived occurrences of {Path(config.table or '').name}",
        )
    return result


def _columns() -> list[str]:
    from .record import SCHEMA

    return list(SCHEMA.names)


def _summarise(rows: Iterator[dict]) -> dict[str, Any]:
    named: Counter = Counter()
    tally: Counter = Counter(with_counts=0, in_controls=0, novel=0, tied=0, reversed=0)
    for row in rows:
        named.update(rank for rank in RANKS if row[rank])
        tally["with_counts"] += row["reads"] is not None
        tally["in_controls"] += bool(row["control_reads"])
        tally["novel"] += row["novelty_rank"] is not None
        tally["tied"] += row["tied_rank"] is not None
        tally["reversed"] += row["strand"] == "minus"
    return {"named": {rank: named[rank] for rank in RANKS}, **tally}


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
