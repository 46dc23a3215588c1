"""A Streamlit page over a table of vectors, or over the results of a classification.

`pip install '.[dashboard]'`, then `streamlit run launch/dashboard.py -- demo/embeddings.db` for
counts by rank, a depth filter and nearest neighbours, or `-- demo/classified` for names by rank,
depth, novelty and sample. The functions above `show_table` need no Streamlit: an existing dashboard
imports them or copies them. No vector is read but that of a query, and no more rows than are shown;
counts read one column, a batch at a time.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from bioscan_xla.classification.counts import Counts, read_counts
from bioscan_xla.classification.journal import FILE as CLASSIFIED
from bioscan_xla.classification.journal import read_records
from bioscan_xla.classification.samples import read_samples
from bioscan_xla.errors import BioscanError, InputError
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.search import search_sequences
from bioscan_xla.table.neighbours import open_table, search_vectors

HIDDEN_COLUMNS = ("dna_sequence", "source", "row", "vector", "hits", "tied_lineages")


def depth_condition(shallowest: float | None, deepest: float | None) -> str | None:
    """SQL condition for a range of depths in metres, ends included; None for no limit at all."""
    parts = []
    if shallowest is not None:
        parts.append(f"depth >= {float(shallowest)}")
    if deepest is not None:
        parts.append(f"depth <= {float(deepest)}")
    return " AND ".join(parts) or None


def count_by_rank(table: Any, rank: str, where: str | None = None) -> dict[str, int]:
    """Rows of each taxon of a rank, most first; rows without a name there count as `unknown`.

    Raises:
        InputError: no such rank.
    """
    if rank not in RANKS:
        raise InputError(f"{rank!r} is not a rank; use one of {', '.join(RANKS)}")
    query = table.search().select([rank])
    counts: Counter[str] = Counter()
    for batch in (query.where(where) if where else query).to_batches(1 << 16):
        for item in batch[rank].value_counts().to_pylist():
            counts[item["values"] or "unknown"] += item["counts"]
    return dict(counts.most_common())


def rows_at(table: Any, where: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
    """Rows that a condition lets through, without sequence and vector."""
    columns = [name for name in table.schema.names if name not in HIDDEN_COLUMNS]
    query = table.search().select(columns).limit(limit)
    return (query.where(where) if where else query).to_list()


def neighbours_of_row(
    table: Any, sequence_id: str, k: int = 10, where: str | None = None
) -> list[dict[str, Any]]:
    """Nearest other rows of a row, nearest first, with `distance` (1 - cosine); runs no model.

    Raises:
        InputError: no row has this id.
    """
    quoted = sequence_id.replace("'", "''")
    found = table.search().where(f"sequence_id = '{quoted}'").select(["vector"]).limit(1).to_arrow()
    if not len(found):
        raise InputError(f"{sequence_id!r}: no row has this sequence_id; look it up in the table")
    vector = np.array(found["vector"][0].as_py(), np.float32)
    others = f"sequence_id <> '{quoted}'" + (f" AND ({where})" if where else "")
    (rows,) = search_vectors(table, vector[None], k, others)
    return [{"distance": row.pop("_distance"), **row} for row in rows.to_pylist()]


def samples_at(
    folder: str, shallowest: float | None = None, deepest: float | None = None
) -> list[str]:
    """Samples of a classification, of a range of depths in metres (ends included) if it is given.

    Empty without counts; samples without a depth are in no range.
    """
    path = Path(folder, "phyloseq", "sample_data.tsv")
    if not path.is_file():
        return []
    counts = _counts_of(folder)
    samples = read_samples([str(path)], counts.samples)
    low = -np.inf if shallowest is None else shallowest
    high = np.inf if deepest is None else deepest
    if (low, high) == (-np.inf, np.inf):
        return counts.samples
    return [
        sample.name
        for sample in samples
        if sample.min_depth_m is not None and low <= sample.min_depth_m <= high
    ]


def _counts_of(folder: str) -> Counts:
    return read_counts(str(Path(folder, "table.biom")))


def named_where(
    folder: str, novelty: tuple[float, float] = (0.0, 1.0), samples: list[str] | None = None
) -> ds.Expression:
    """Condition on classified rows.

    Args:
        folder: the output of classify.
        novelty: least and greatest; the full range also lets rows without a novelty through.
        samples: rows that were counted in one of these; None lets all through.
    """
    low, high = novelty
    condition = ds.scalar(True)
    if (low, high) != (0.0, 1.0):
        condition = (ds.field("novelty") >= low) & (ds.field("novelty") <= high)
    if samples is not None:
        counts = _counts_of(folder)
        columns = np.flatnonzero(np.isin(counts.samples, samples))
        has_reads = np.asarray(counts.matrix[:, columns].sum(1)).ravel() > 0
        row_of = counts.match(read_records(folder))
        ids = [name for name, row in row_of.items() if has_reads[row]]
        condition &= ds.field("sequence_id").isin(pa.array(ids, pa.string()))
    return condition


def count_names(folder: str, rank: str, condition: ds.Expression | None = None) -> dict[str, int]:
    """Sequences of each taxon of a rank, most first; those that are not named there are `unknown`.

    Raises:
        InputError: no such rank.
    """
    if rank not in RANKS:
        raise InputError(f"{rank!r} is not a rank; use one of {', '.join(RANKS)}")
    counts: Counter[str] = Counter()
    for batch in _classified(folder).to_batches(columns=[rank], filter=condition):
        for item in batch[rank].value_counts().to_pylist():
            counts[item["values"] or "unknown"] += item["counts"]
    return dict(counts.most_common())


def rows_named(
    folder: str, condition: ds.Expression | None = None, limit: int = 1000
) -> list[dict[str, Any]]:
    """Classified rows that a condition lets through, without sequence, evidence and vector."""
    dataset = _classified(folder)
    columns = [name for name in dataset.schema.names if name not in HIDDEN_COLUMNS]
    return dataset.head(limit, columns=columns, filter=condition).to_pylist()


def _classified(folder: str) -> ds.Dataset:
    return ds.dataset(Path(folder, CLASSIFIED), format="parquet")


def show_table(st: Any, db: str) -> None:
    """The page of a table of vectors."""
    name = st.sidebar.text_input("Table", "embeddings")
    rank = st.sidebar.selectbox("Rank", RANKS, index=RANKS.index("phylum"))
    shallowest = st.sidebar.number_input("Shallowest, m", value=None, min_value=0.0)
    deepest = st.sidebar.number_input("Deepest, m", value=None, min_value=0.0)
    query = st.text_input("Neighbours of", placeholder="a sequence_id, or a DNA sequence")
    where = depth_condition(shallowest, deepest)
    table = open_table(db, name)  # a new page sees what was committed since
    st.metric("Sequences", table.count_rows(where))
    st.bar_chart(count_by_rank(table, rank, where))
    if not query:
        st.dataframe(rows_at(table, where))
    elif set(query.upper()) <= set("ACGTUN"):
        st.dataframe(search_sequences(db, [query], table=name, where=where))
    else:
        st.dataframe(neighbours_of_row(table, query, where=where))


def show_names(st: Any, folder: str) -> None:
    """The page of a classification."""
    rank = st.sidebar.selectbox("Rank", RANKS, index=RANKS.index("phylum"))
    novelty = st.sidebar.slider("Novelty", 0.0, 1.0, (0.0, 1.0))
    samples = None
    if everywhere := samples_at(folder):
        shallowest = st.sidebar.number_input("Shallowest, m", value=None, min_value=0.0)
        deepest = st.sidebar.number_input("Deepest, m", value=None, min_value=0.0)
        here = samples_at(folder, shallowest, deepest)
        chosen = st.sidebar.multiselect("Samples", here)
        samples = chosen or (here if len(here) < len(everywhere) else None)
    condition = named_where(folder, novelty, samples)
    counts = count_names(folder, rank, condition)
    st.metric("Sequences", sum(counts.values()))
    st.bar_chart(counts)
    st.dataframe(rows_named(folder, condition))


def main() -> None:
    """Draw the page; Streamlit runs it anew at every click."""
    import streamlit as st

    st.title("Environmental DNA")
    given = sys.argv[1] if len(sys.argv) > 1 else "embeddings.db"
    place = st.sidebar.text_input("Database, or folder of classify", given)
    try:
        if Path(place, CLASSIFIED).is_file():
            show_names(st, place)
        else:
            show_table(st, place)
    except BioscanError as error:
        st.error(str(error))


if __name__ == "__main__":
    main()
