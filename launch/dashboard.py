"""A Streamlit page over the table: counts by rank, a depth filter, nearest neighbours.

`pip install '.[dashboard]'`, then `streamlit run launch/dashboard.py -- demo/embeddings.db`. The
functions above `main` need no Streamlit: an existing dashboard imports them or copies them.
No vector is read but that of a query, and no more rows than are shown; counts read one column, a
batch at a time.
"""

import sys
from collections import Counter
from typing import Any

import numpy as np

from bioscan_xla.errors import BioscanError, InputError
from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.search import search_sequences
from bioscan_xla.table.neighbours import open_table, search_vectors

HIDDEN_COLUMNS = ("dna_sequence", "source", "row", "vector")


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


def main() -> None:
    """Draw the page; Streamlit runs it anew at every click."""
    import streamlit as st

    st.title("Environmental DNA")
    db = st.sidebar.text_input("Database", sys.argv[1] if len(sys.argv) > 1 else "embeddings.db")
    name = st.sidebar.text_input("Table", "embeddings")
    rank = st.sidebar.selectbox("Rank", RANKS, index=RANKS.index("phylum"))
    shallowest = st.sidebar.number_input("Shallowest, m", value=None, min_value=0.0)
    deepest = st.sidebar.number_input("Deepest, m", value=None, min_value=0.0)
    query = st.text_input("Neighbours of", placeholder="a sequence_id, or a DNA sequence")
    where = depth_condition(shallowest, deepest)
    try:
        table = open_table(db, name)  # a new page sees what was committed since
        st.metric("Sequences", table.count_rows(where))
        st.bar_chart(count_by_rank(table, rank, where))
        if not query:
            st.dataframe(rows_at(table, where))
        elif set(query.upper()) <= set("ACGTUN"):
            st.dataframe(search_sequences(db, [query], table=name, where=where))
        else:
            st.dataframe(neighbours_of_row(table, query, where=where))
    except BioscanError as error:
        st.error(str(error))


if __name__ == "__main__":
    main()
