"""What the tests of classify share: a reference, queries of it, counts and samples."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_xla import run_classification_pipeline
from bioscan_xla.classification.journal import read_rows
from bioscan_xla.classification.kmers import reverse_complement
from bioscan_xla.reads.lineages import RANKS


def mutate(sequence, share, rng):
    letters = [
        str(rng.choice([c for c in "ACGT" if c != letter])) if rng.random() < share else letter
        for letter in sequence
    ]
    return "".join(letters)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A reference of 4 families, 12 genera and 36 species; queries; counts; samples."""
    folder = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(3)
    rows, queries = [], []
    root = "".join(rng.choice(list("ACGT"), 240))
    for family in range(4):
        of_family = mutate(root, 0.15, rng)
        for genus in range(3):
            of_genus = mutate(of_family, 0.08, rng)
            for species in range(3):
                of_species = mutate(of_genus, 0.03, rng)
                name = f"Genus{'abcd'[family]}{'xyz'[genus]}"
                lineage = ["Animalia", "Chordata", "Actinopteri", f"Order{'ab'[family // 2]}"]
                lineage += [f"Family{'abcd'[family]}", name, f"{name} {'pqr'[species]}us"]
                for _copy in range(4):
                    rows.append(
                        {
                            "sequence_id": f"R{len(rows):04d}",
                            "dna_sequence": mutate(of_species, 0.004, rng),
                            **dict(zip(RANKS, lineage, strict=True)),
                        }
                    )
                queries.append((f"q{len(queries)}", mutate(of_species, 0.004, rng), lineage))
    queries.append(("far", "".join(rng.choice(list("ACGT"), 200)), [None] * 7))
    pq.write_table(pa.Table.from_pylist(rows), folder / "reference.parquet")
    with open(folder / "reference.fasta", "w") as file:
        for row in rows:
            tax = ",".join(f"{r[0]}:{row[r]}" for r in RANKS)
            file.write(f">{row['sequence_id']};tax={tax};\n{row['dna_sequence']}\n")
    with open(folder / "asv.fasta", "w") as file:
        for number, (name, sequence, _) in enumerate(queries):
            text = reverse_complement(sequence) if number % 5 == 1 else sequence
            file.write(f">{name}\n{text}\n")
        file.write(">bad\nACGTXX!!ACGTACGTACGTACGTACGT\n")
    with open(folder / "counts.tsv", "w") as file:
        file.write("# Constructed from biom file\n#OTU ID\tL1\tL2\tL3\n")
        for number, (name, _, _) in enumerate(queries):
            file.write(f"{name}\t{number}.0\t{number % 3}\t{5 if number == 0 else 0}\n")
    (folder / "samples.tsv").write_text(
        "# section\ta\tb\nsamp_name\tsamp_category\tdecimalLatitude\tdecimalLongitude"
        "\teventDate\tminimumDepthInMeters\tenv_medium\n"
        "S1\tsample\t10.5\t-120\t2023-04-15\t900\tsea water\n"
        "S2\tsample\tnot applicable\tnot applicable\t2023-04-15\t100\t\n"
        "B1\tnegative control\tnot applicable\tnot applicable\tnot applicable\t\t\n"
    )
    (folder / "libraries.tsv").write_text(
        "# x\nsamp_name\tlib_id\tassay_name\nS1\tL1\t12S\nS2\tL2\t12S\nB1\tL3\t12S\n"
    )
    (folder / "worms.csv").write_text("scientificName,AphiaID\nGenusax pus,12345\n")
    return folder, queries


@pytest.fixture(scope="module")
def done(data):
    folder, _queries = data
    output = folder / "out"
    result = run_classification_pipeline(
        str(folder / "asv.fasta"),
        str(folder / "reference.parquet"),
        str(output),
        table=str(folder / "counts.tsv"),
        samples=[str(folder / "samples.tsv"), str(folder / "libraries.tsv")],
        known_taxa=str(folder / "worms.csv"),
        target_gene="12S rRNA",
        num_trials=300,
        novel_share=0.05,
    )
    return output, result, {row["sequence_id"]: row for row in read_rows(output)}
