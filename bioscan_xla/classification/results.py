"""The output files of a classification, written once every record is named.

Input: the rows of the journal and, where they are given, counts and samples. Output: the files of
`--output` and the figures of `run.json`. Invariants: each file is made from the joined rows alone,
so that a run that is repeated writes the same.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import __version__
from ..errors import InputError
from ..options import ClassifyConfig
from ..reads.lineages import RANKS
from .counts import Counts, read_counts
from .darwin_core import write_archive
from .formats import write_biom, write_phyloseq, write_texts
from .journal import Journal, read_rows
from .overview import summarise
from .record import SCHEMA, is_unplaced
from .reference import Reference
from .report import write_report
from .samples import Sample, read_samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """What belongs to `--table` and `--samples`.

    Attributes:
        counts: with controls left out where that was asked for.
        samples: of the columns of `counts`.
        num_controls: negative controls in the table.
        control_reads: (rows of `counts`,) reads in negative controls, those left out too.
        row_of: row of `counts` by sequence_id, once all records are named.
    """

    counts: Counts
    samples: list[Sample]
    num_controls: int
    control_reads: np.ndarray
    row_of: Mapping[str, int] = field(default_factory=dict)


def read_sampling(config: ClassifyConfig) -> Sampling | None:
    """Read `--table` and `--samples`; None without a table.

    Raises:
        InputError: a file cannot be read, or names none of the samples.
    """
    if config.table is None:
        return None
    counts = read_counts(config.table)
    if config.samples:
        samples = read_samples(config.samples, counts.samples)
        known = [s for s in samples if s.fields]  # the others make no occurrence
        if not config.target_gene and not all(s.fields.get("target_gene") for s in known):
            log.warning("dwca.zip will lack the marker; name it with --target-gene '12S rRNA'")
    else:
        samples = [Sample(name) for name in counts.samples]
    unknown = [s.name for s in samples if config.samples and not s.fields]
    if unknown:
        log.warning(
            "samples without metadata: %d of %d, such as %s",
            len(unknown),
            len(samples),
            unknown[0],
        )
    controls = np.array([s.is_control for s in samples], bool)
    control_reads = np.asarray(counts.matrix[:, np.flatnonzero(controls)].sum(1)).ravel()
    if controls.any() and config.remove_controls:
        keep = np.flatnonzero(~controls)
        samples = [samples[at] for at in keep]
        counts = Counts(counts.ids, [s.name for s in samples], counts.matrix[:, keep])
    return Sampling(counts, samples, int(controls.sum()), control_reads)


def _completion(sampling: Sampling | None) -> Callable[[pa.Table], pa.Table]:
    """What fills in the counts of some rows."""
    if sampling is None:
        return _without_counts
    controls = np.array([sample.is_control for sample in sampling.samples], bool)
    matrix = sampling.counts.matrix
    reads = np.asarray(matrix[:, np.flatnonzero(~controls)].sum(1)).ravel()
    num_samples = np.asarray((matrix[:, np.flatnonzero(~controls)] > 0).sum(1)).ravel()

    def complete(rows: pa.Table) -> pa.Table:
        at = [sampling.row_of.get(name) for name in rows["sequence_id"].to_pylist()]
        for column, values in (
            ("reads", reads),
            ("num_samples", num_samples),
            ("control_reads", sampling.control_reads),
        ):
            field = rows.schema.field(column)
            cells = [None if place is None else int(values[place]) for place in at]
            number = rows.schema.get_field_index(column)
            rows = rows.set_column(number, field, pa.array(cells, field.type))
        return rows

    return complete


def _without_counts(rows: pa.Table) -> pa.Table:
    """The rows without the counts that an earlier run gave them."""
    for column in ("reads", "num_samples", "control_reads"):
        field = rows.schema.field(column)
        number = rows.schema.get_field_index(column)
        rows = rows.set_column(number, field, pa.nulls(len(rows), field.type))
    return rows


def _remove_earlier(folder: Path, config: ClassifyConfig) -> None:
    """Remove what an earlier run wrote and this one may not write: it would contradict the rest."""
    needs = {"table.biom": config.table, "phyloseq": config.table, "dwca.zip": config.samples}
    gone = [name for name, given in needs.items() if not given and (folder / name).exists()]
    if gone:
        log.warning(
            "removed from %s, as this run has no %s: %s. Run again with it to write them anew",
            folder,
            "--samples" if config.table else "--table",
            ", ".join(gone),
        )
    for name in ("table.biom", "dwca.zip", "report.html", "run.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "phyloseq", ignore_errors=True)


def write_results(
    config: ClassifyConfig,
    journal: Journal,
    reference: Reference,
    sampling: Sampling | None,
    known_taxa: Mapping[str, str],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """Join the rows and write every table; returns figures for run.json.

    Args:
        config: options.
        journal: holds all rows.
        reference: that they were named by.
        sampling: with `row_of`.
        known_taxa: identifiers by name.
        run: what run.json says so far.

    Raises:
        InputError: the count table has none of the input's ids; the names are written before.
    """
    folder = Path(config.output)
    _remove_earlier(folder, config)
    result: dict[str, Any] = {"classified": journal.join(_completion(sampling))}
    label = " ".join(
        part
        for part in (reference.name, reference.version, f"sha256:{reference.content_hash[:16]}")
        if part
    )

    def rows() -> Iterator[dict]:
        columns = [name for name in SCHEMA.names if name != "vector"]
        return read_rows(folder, columns)

    write_texts(folder, rows(), label)
    result |= _count_names(rows())
    if sampling is None:
        return result
    counts, row_of, samples = sampling.counts, sampling.row_of, sampling.samples
    _check_matches(folder, config.table or "", counts, row_of, result["classified"])
    made_by = f"bioscan_xla {__version__}"
    write_biom(folder / "table.biom", rows(), counts, row_of, samples, made_by)
    write_phyloseq(folder / "phyloseq", rows(), counts, row_of, samples)
    result["controls"] = {
        "samples": sampling.num_controls,
        "removed": config.remove_controls,
        "sequences": result.pop("in_controls"),
        "only_there": result.pop("only_in_controls"),
    }
    if config.samples:
        result["darwin_core"] = write_archive(
            folder / "dwca.zip",
            rows,
            counts,
            row_of,
            samples,
            method=run["method"],
            reference=label,
            known_taxa=known_taxa,
            target_gene=config.target_gene,
            title=f"DNA-derived occurrences of {Path(config.table or '').name}",
        )
    return result


def _check_matches(
    folder: Path, table: str, counts: Counts, row_of: Mapping[str, int], total: int
) -> None:
    """Tell of rows and sequences without each other; InputError where none match."""
    if not row_of:
        raise _no_match(folder, table, counts)
    rows = len(counts.ids)
    lost = np.setdiff1d(np.arange(rows), list(row_of.values()))
    if len(lost):
        log.warning(
            "rows of %s without a named sequence of their own: %d of %d, such as %r, with %d of %d "
            "reads. In table.biom and phyloseq they have no lineage; they are in no other file",
            table,
            len(lost),
            rows,
            _shorten(counts.ids[lost[0]], 50),
            counts.matrix[lost].sum(),
            counts.matrix.sum(),
        )
    if len(row_of) < total:
        log.warning(
            "sequences of the input that have no row of their own in %s: %d of %d; they are in no "
            "sample",
            table,
            total - len(row_of),
            total,
        )


def _shorten(text: str, most: int) -> str:
    """The text, or its beginning: a name may be a whole sequence."""
    return text if len(text) <= most else text[:most] + "..."


def _no_match(folder: Path, table: str, counts: Counts) -> InputError:
    names = set(counts.samples)
    ids = [row["sequence_id"] for row in read_rows(folder, ["sequence_id"])]
    remedy = (
        f"the ids must be the same, such as {_shorten(ids[0], 50)!r}" if ids else "none is named"
    )
    if any(name in names for name in ids):
        remedy = "its columns are; transpose it, so that rows are sequences and columns samples"
    return InputError(
        f"{table}: none of its rows, such as {_shorten(counts.ids[0], 50)!r}, is a sequence of the "
        f"input; {remedy}. The names are in classified.parquet"
    )


def _count_names(rows: Iterator[dict]) -> dict[str, Any]:
    named: Counter = Counter()
    tally: Counter = Counter(
        in_controls=0,
        only_in_controls=0,
        unplaced=0,
        unsure=0,
        novel=0,
        tied=0,
        reversed=0,
        contradictions=0,
    )
    for row in rows:
        named.update(rank for rank in RANKS if row[rank])
        tally["in_controls"] += bool(row["control_reads"])
        tally["only_in_controls"] += bool(row["control_reads"] and not row["reads"])
        tally["unplaced"] += is_unplaced(row)
        tally["novel"] += row["novelty_rank"] is not None
        tally["tied"] += row["tied_rank"] is not None
        tally["reversed"] += row["strand"] == "minus"
        tally["contradictions"] += bool(row["contradiction"])
        tally["unsure"] += row["assigned_rank"] is None and not is_unplaced(row)
    return {"named": {rank: named[rank] for rank in RANKS}, **tally}


def write_page(folder: str, sampling: Sampling | None, run: Mapping[str, Any]) -> None:
    """Write report.html; `run` is what run.json will hold."""
    counted = (sampling.samples, sampling.counts, sampling.row_of) if sampling else ()
    write_report(Path(folder) / "report.html", summarise(read_rows(folder), *counted), run)
