"""Mislabels, shared barcodes and contradictions that were put in are found, and only these."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla.reads.lineages import RANKS
from bioscan_xla.reference import main


def change(sequence, share, rng):
    return "".join(
        str(rng.choice(list("ACGT"))) if rng.random() < share else letter for letter in sequence
    )


@pytest.fixture
def reference(tmp_path):
    rng = np.random.default_rng(1)
    rows = []
    for family in "ABC":
        base = "".join(rng.choice(list("ACGT"), 200))
        for species in "abc":
            of_species = change(base, 0.02, rng)
            for _ in range(4):
                names = ["K", "P", "C", f"Order {family}".replace(" ", ""), f"Fam{family}"]
                names += [f"Gen{family}", f"Gen{family} {species}us"]
                rows.append((f"r{len(rows)}", change(of_species, 0.004, rng), names))
    a_names, b_names = rows[0][2], rows[12][2]
    rows.append(("wrong", change(rows[0][1], 0.01, rng), list(b_names)))
    rows.append(("twin", rows[5][1], [*a_names[:6], "GenA xus"]))
    rows.append(("torn", change(rows[30][1], 0.01, rng), ["K", "P", "D", *rows[30][2][3:]]))
    rows.append(("sole", change(rows[0][1], 0.01, rng), [*a_names[:5], "GenNew", "GenNew aus"]))
    table = {
        "sequence_id": [row[0] for row in rows],
        "dna_sequence": [row[1] for row in rows],
        **{rank: [row[2][at] for row in rows] for at, rank in enumerate(RANKS)},
    }
    pq.write_table(pa.table(table), tmp_path / "reference.parquet")
    return tmp_path / "reference.parquet"


def test_what_was_put_in_is_found(reference, tmp_path, capsys):
    assert main(["check", str(reference), "--output", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "problems.tsv", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t"))
    mislabels = [row for row in found if row["kind"] == "mislabel"]
    assert {row["ids"] for row in mislabels} >= {"wrong"}
    assert {row["ids"] for row in mislabels} <= {"wrong", "torn"}
    (wrong,) = [row for row in mislabels if row["ids"] == "wrong"]
    assert wrong["rank"] == "order"
    assert wrong["labels"] == "OrderB | OrderA"
    assert "% (K;P;C;OrderA;FamA;GenA" in wrong["evidence"]
    shared, *_ = [row for row in found if "twin" in row["ids"]]
    assert shared["kind"] == "shared_barcode"
    assert {"r5", "twin"} <= set(shared["ids"].split())
    assert shared["rank"] == "species"
    torn = [row for row in found if row["kind"] == "contradiction"]
    assert "order" in {row["rank"] for row in torn}
    assert "Suspected mislabels" in capsys.readouterr().out
    with open(tmp_path / "out" / "coverage.tsv", newline="") as file:
        taxa = {(row["rank"], row["taxon"]): row for row in csv.DictReader(file, delimiter="\t")}
    assert taxa["genus", "GenA"]["sequences"] == "13"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "http" not in page
    assert "OrderB" in page


def test_another_action_is_refused(capsys):
    assert main(["mend", "x.fasta"]) == 1
    assert "choose check" in capsys.readouterr().err
