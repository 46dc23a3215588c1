"""Check a reference, or whiten its vectors: `python -m bioscan_xla.reference ACTION DB`.

Input: a database made by embed; for check also labelled FASTA or Parquet. Output: `problems.tsv`,
`coverage.tsv` and a page of both, `index.html`; or a second table in the database. Invariants: the
reference is only read.
"""

import csv
import html
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import run_command
from .options import ReferenceConfig
from .reads.lineages import RANKS

if TYPE_CHECKING:
    from .classification.reference_check import Problem

_SHOWN = 200
_KINDS = {
    "mislabel": "Suspected mislabels: the name disagrees with all near neighbours",
    "shared_barcode": "Identical barcodes under several names",
    "contradiction": "Names with several sets of ancestors",
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;
padding:0 1rem;color:#1b2733}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
padding:.3rem .7rem;border-bottom:1px solid #dde4ea}th{font-weight:600;background:#f3f6f8}
td.n{text-align:right;font-variant-numeric:tabular-nums}.cards td{overflow-wrap:anywhere}
@media(max-width:700px){.cards th{display:none}.cards td{display:block;border:0;padding:.1rem 0}
.cards tr{display:block;border-bottom:1px solid #dde4ea;padding:.5rem 0}}
"""


def check(config: ReferenceConfig) -> list["Problem"]:
    """Check a reference and write what was found."""
    from .classification.reference import load_reference
    from .classification.reference_check import check_reference, coverage, figures

    reference = load_reference(
        config.reference,
        table=config.table,
        columns=config.columns,
        header_taxonomy=config.header_taxonomy,
    )
    problems = check_reference(reference)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[list[object]] = [
        [p.kind, p.rank, " ".join(p.sequence_ids), " | ".join(p.labels), p.evidence]
        for p in problems
    ]
    _write_tsv(folder / "problems.tsv", ("kind", "rank", "ids", "labels", "evidence"), lines)
    taxa = coverage(reference)
    _write_tsv(folder / "coverage.tsv", list(taxa[0]), [list(taxon.values()) for taxon in taxa])
    title = f"{reference.name}: {len(reference.ids):,} references"
    page = _page(title, figures(reference), problems, taxa)
    (folder / "index.html").write_text(page, encoding="utf-8")
    return problems


def transform(config: ReferenceConfig) -> tuple[int, str]:
    """Center or whiten a table's vectors into another table; returns its rows and its name."""
    from .errors import InputError
    from .reads.inputs import is_remote
    from .table.transformed import transform_table

    if Path(config.reference).is_file() and not is_remote(config.reference):
        raise InputError(
            f"{config.reference}: a file has no vectors to {config.action}; embed it first: "
            f"python -m bioscan_xla.embed --input {config.reference} --db FOLDER"
        )
    to = config.to or {"center": "centered", "whiten": "whitened"}[config.action]
    return transform_table(config.reference, config.table, to, config.action), to


def _write_tsv(path: Path, header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def _page(
    title: str, told: dict, problems: Sequence["Problem"], taxa: Sequence[dict[str, object]]
) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        _table(("", ""), list(told.items())),
    ]
    for kind, heading in _KINDS.items():
        found = [p for p in problems if p.kind == kind]
        by_rank = Counter(p.rank for p in found)
        told_ranks = ", ".join(f"{rank} {by_rank[rank]:,}" for rank in RANKS if by_rank[rank])
        parts.append(f"<h2>{heading}: {len(found):,}</h2><p>{told_ranks or 'none'}</p>")
        if len(found) > _SHOWN:
            parts.append(f"<p>The first {_SHOWN}; all are in problems.tsv.</p>")
        rows = [
            (p.rank, ", ".join(p.sequence_ids[:5]), " | ".join(p.labels), p.evidence)
            for p in found[:_SHOWN]
        ]
        if rows:
            parts.append(_table(("highest rank", "ids", "names", "evidence"), rows, "cards"))
    high = [taxon for taxon in taxa if taxon["rank"] in RANKS[:4]]
    high.sort(key=lambda taxon: (RANKS.index(str(taxon["rank"])), -int(str(taxon["sequences"]))))
    parts.append("<h2>Coverage down to order</h2><p>All ranks are in coverage.tsv.</p>")
    parts.append(_table(list(taxa[0]), [list(taxon.values()) for taxon in high]))
    return "\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], look: str = "") -> str:
    def cell(value: object) -> str:
        if isinstance(value, int):
            return f"<td class=n>{value:,}"
        return f"<td>{html.escape(str(value))}"

    head = "".join(f"<th>{html.escape(name)}" for name in header) if any(header) else ""
    lines = "\n".join("<tr>" + "".join(map(cell, row)) for row in rows)
    return f"<div class=wide><table class='{look}'><tr>{head}\n{lines}</table></div>"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work(config: ReferenceConfig) -> int:
        if config.action != "check":
            rows, to = transform(config)
            print(f"{rows:,} rows in the table {to} of {config.reference}")
            print(f"embed and search: --table {to}; classify: --reference-table {to}")
            return 0
        problems = check(config)
        for kind, heading in _KINDS.items():
            by_rank = Counter(p.rank for p in problems if p.kind == kind)
            told = ", ".join(f"{rank} {by_rank[rank]:,}" for rank in RANKS if by_rank[rank])
            print(f"{heading}: {by_rank.total():,}{f' ({told})' if told else ''}")
        print(f"in {config.output}: problems.tsv, coverage.tsv, index.html")
        return 0

    return run_command(
        ReferenceConfig,
        work,
        arguments,
        "python -m bioscan_xla.reference",
        positionals=("action", "reference"),
    )


if __name__ == "__main__":
    sys.exit(main())
