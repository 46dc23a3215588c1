"""Search a table with sequences: `python -m bioscan_xla.search --db DB ACGT...`.

Input: sequences on the command line or a FASTA/FASTQ file. Output: the nearest rows, as a readable
table (`table`), CSV or JSON; exit status 1 if a query could not be used.
"""

import csv
import json
import logging
import os
import sys
from collections.abc import Sequence

from .cli import run_command
from .errors import InputError
from .options import SearchConfig
from .reads.cleaning import clean_sequences
from .reads.fasta import read_sequences
from .reads.inputs import format_of
from .reads.lineages import RANKS

log = logging.getLogger(__name__)

_SHOWN = ("query", "distance", "sequence_id", "phylum", "order", "family", "species", "depth")


def search_sequences(
    db: str,
    sequences: Sequence[str],
    *,
    table: str = "embeddings",
    k: int = 10,
    where: str | None = None,
    device: str = "auto",
    names: Sequence[str] | None = None,
    model: str | None = None,
    adapter: str | None = None,
) -> list[dict]:
    """Nearest rows of each sequence.

    Args:
        db: database folder or URL.
        sequences: as typed; they are cleaned in the same way as input files.
        table: name of the table.
        k: rows per sequence.
        where: SQL condition on the columns, such as `depth > 1000 AND phylum = 'Cnidaria'`.
        device: where the model runs.
        names: of the sequences; by default query_1, query_2, ...
        model: where the model is now, if it has moved since the table was made.
        adapter: where the adapter is now, if it has moved.

    Returns:
        One dict per row: `query`, `distance` (1 - cosine), and the columns of the table.

    Raises:
        TableError: no such table, or the condition cannot be read.
        InputError: a sequence that cannot be used.
        ModelError: the model that made the table has moved or changed.
    """
    # Imported here so that command-line errors are reported first.
    from .encode.inference import embed_text
    from .table.embedding_function import load_as
    from .table.neighbours import nearest_rows, open_table, read_fingerprint

    opened = open_table(db, table)
    made_by = read_fingerprint(opened)
    if not made_by:
        raise InputError(f"{db}: the table {table!r} was not made by bioscan_xla")
    encoder = load_as(made_by, model=model, adapter=adapter, device=device)
    names = names or [f"query_{number + 1}" for number in range(len(sequences))]
    found = nearest_rows(opened, embed_text(encoder, sequences), k, where)
    return [{"query": name, **row} for name, rows in zip(names, found, strict=True) for row in rows]


def read_queries(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Queries from arguments that are sequences or FASTA/FASTQ files.

    Returns:
        Names; their sequences, cleaned; and for each query that cannot be used a line that says
        which and why.

    Raises:
        InputError: no query can be used.
    """
    names: list[str] = []
    texts: list[str] = []
    broken: list[str] = []
    for word in words:
        if os.path.exists(word):
            if format_of(word) == "parquet":
                raise InputError(f"{word}: queries must be FASTA or FASTQ")
            try:
                for record in read_sequences(word):
                    name = next(iter(record.header.split(maxsplit=1)), "")
                    if record.problem:
                        broken.append(f"{name or word}: {record.problem}")
                        continue
                    names.append(name)
                    texts.append(record.text)
            except InputError as error:  # what comes before the damage is searched
                broken.append(str(error))
        elif any(letter in word for letter in "./\\"):
            raise InputError(f"{word}: no such file")
        else:
            names.append(f"query_{len(names) + len(broken) + 1}")
            texts.append(word)
    sequences, complaints, _ = clean_sequences(texts)
    broken += [f"{names[at]}: {complaint.reason}" for at, complaint in complaints.items()]
    good = [at for at in range(len(names)) if at not in complaints]
    if not good:
        told = f" can be used ({broken[0]})" if broken else ": pass a sequence or a FASTA file"
        raise InputError(f"no query{told}")
    return [names[at] for at in good], [sequences[at] for at in good], broken


def _write(rows: list[dict], style: str) -> None:
    if style == "json":
        from .table.neighbours import plain

        json.dump(rows, sys.stdout, indent=1, default=plain)
        print()
    elif style == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else ["query"])
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print_table(rows)


def _print_table(rows: list[dict]) -> None:
    if not rows:
        print("nothing found: the table has no rows, or none that match --where")
        return
    # Leave out columns that are empty in every row.
    names = [name for name in _SHOWN if any(row.get(name) is not None for row in rows)]
    if not any(name in RANKS for name in names):
        names += [rank for rank in RANKS if any(row.get(rank) for row in rows)]
    cells = [names] + [[_text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(names))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _work(config: SearchConfig) -> int:
    names, sequences, broken = read_queries(config.query)
    for line in broken:
        log.warning("query left out: %s", line)
    rows = search_sequences(
        config.db,
        sequences,
        table=config.table,
        k=config.k,
        where=config.where,
        device=config.device,
        names=names,
        model=config.model,
        adapter=config.adapter,
    )
    try:
        _write(rows, config.format)
        sys.stdout.flush()
    except BrokenPipeError:  # the other end of a pipe, such as `head`, has closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if broken:
        count = len(broken) + len(names)
        print(f"error: {len(broken)} of {count} queries could not be used", file=sys.stderr)
    return 1 if broken else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(
        SearchConfig,
        _work,
        arguments,
        "python -m bioscan_xla.search",
        positionals=("query",),
        short={"-k": "k"},
    )


if __name__ == "__main__":
    sys.exit(main())
