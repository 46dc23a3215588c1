"""Outputs of classify given to other people's programs; each test is skipped where one is absent.

Debian has q2cli with q2-types, and r-bioc-phyloseq with r-bioc-rhdf5. dwcahandler wants an old
pandas and so an environment of its own: DWCAHANDLER_PYTHON names its Python.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bioscan_xla.classification.counts import read_counts
from bioscan_xla.classification.darwin_core import write_archive
from bioscan_xla.classification.formats import write_biom, write_phyloseq, write_texts
from bioscan_xla.classification.journal import read_records, read_rows
from bioscan_xla.classification.samples import read_samples
from bioscan_xla.reads.lineages import RANKS

DIFFICULT = ["K", None, "C; x,y", 'The "order"', "Fämilia #1", "Sp. 'O'", "Aus bus\u00a0\u03b2 1%"]


@pytest.fixture(scope="module")
def named(data, done, tmp_path_factory):
    """The cruise's results with difficult names, written anew."""
    folder, _ = data
    output = tmp_path_factory.mktemp("named")
    rows = list(read_rows(done[0]))
    for row in rows[:3]:
        row |= {rank: name for rank, name in zip(RANKS, DIFFICULT, strict=True)}
        row |= {f"best_{rank}": row[rank] for rank in RANKS}
        row |= {f"confidence_{rank}": 0.5 for rank in RANKS}
    counts = read_counts(str(folder / "counts.tsv"))
    metadata = [str(folder / "samples.tsv"), str(folder / "libraries.tsv")]
    samples = read_samples(metadata, counts.samples)
    row_of = counts.match(read_records(done[0]))
    write_texts(output, rows, "reference")
    write_biom(output / "table.biom", rows, counts, row_of, samples, "bioscan_xla")
    write_phyloseq(output / "phyloseq", rows, counts, row_of, samples)
    write_archive(
        output / "dwca.zip",
        lambda: rows,
        counts,
        row_of,
        samples,
        method="bioscan_xla: by the nearest",
        reference="reference",
        known_taxa={},
        target_gene="12S rRNA",
        title="Difficult names",
    )
    unassigned = output / "unassigned"
    unassigned.mkdir()
    write_texts(unassigned, [row | dict.fromkeys(RANKS) for row in rows], "reference")
    return output


def run(words, folder, **environment):
    """Run a program of the system, whose Python knows nothing of ours."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    kept |= {"HOME": str(folder), "LC_ALL": "C.UTF-8", **environment}
    result = subprocess.run(
        [str(word) for word in words],
        env=kept,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/bin/qiime").is_file(), reason="q2cli is not installed")
def test_qiime_2_imports_taxonomy_table_and_sequences(named):
    for kind, file, form in (
        ("FeatureData[Taxonomy]", "taxonomy.tsv", "TSVTaxonomyFormat"),
        ("FeatureData[Taxonomy]", "unassigned/taxonomy.tsv", "TSVTaxonomyFormat"),
        ("FeatureData[Taxonomy]", "table.biom", "BIOMV210Format"),
        ("FeatureTable[Frequency]", "table.biom", "BIOMV210Format"),
        ("FeatureData[Sequence]", "oriented.fasta", "DNAFASTAFormat"),
    ):
        words = ["/usr/bin/qiime", "tools", "import", "--type", kind, "--input-path", file]
        words += ["--input-format", form, "--output-path", "out.qza"]
        assert f"Imported {file}" in run(words, named, MPLBACKEND="Agg")


R = """
suppressMessages(library(phyloseq))
otu <- as.matrix(read.delim("phyloseq/otu_table.tsv", row.names = 1, check.names = FALSE))
tax <- as.matrix(read.delim("phyloseq/tax_table.tsv", row.names = 1))
samples <- read.delim("phyloseq/sample_data.tsv", row.names = 1)
all <- phyloseq(otu_table(otu, taxa_are_rows = TRUE), tax_table(tax), sample_data(samples))
cat(ntaxa(all), nsamples(all), rank_names(all), sum(is.na(tax_table(all)[, "Phylum"])), "\\n")
cat(unique(tax[grepl("order", tax[, "Order"]), "Order"]), "\\n")
if (requireNamespace("rhdf5", quietly = TRUE)) {
  suppressMessages(library(rhdf5))
  biom <- import_biom("table.biom", parseFunction = parse_taxonomy_greengenes)
  stopifnot(identical(rank_names(biom), rank_names(all)), nsamples(biom) == nsamples(all))
  stopifnot(sum(otu_table(biom)) == sum(otu_table(all)))
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("Rscript") is None, reason="R is not installed")
def test_phyloseq_reads_tables_and_biom(named):
    try:
        run(["Rscript", "-e", "library(phyloseq)"], named)
    except AssertionError:
        pytest.skip("phyloseq is not installed")
    first, second = run(["Rscript", "-e", R], named).splitlines()
    ranks = [rank.capitalize() for rank in RANKS]
    assert first.split()[:-1] == ["37", "3", *ranks]
    assert second.strip() == 'The "order"'


DWCAHANDLER = """
import csv, os, sys, xml.etree.ElementTree as tree, zipfile
import dwcahandler
from dwcahandler import DwcaHandler
if not DwcaHandler.validate_dwca("dwca.zip", content_keys={"occurrence": "occurrenceID"}):
    sys.exit("refused")
terms = os.path.join(os.path.dirname(dwcahandler.__file__), "dwca", "terms", "terms.csv")
with open(terms, newline="") as file:
    known = {row["uri"] for row in csv.DictReader(file)}
meta = tree.fromstring(zipfile.ZipFile("dwca.zip").read("meta.xml"))
used = {field.get("term") for field in meta.iter("{http://rs.tdwg.org/dwc/text/}field")}
print(len(used), sorted(used - known))
"""


@pytest.mark.skipif("DWCAHANDLER_PYTHON" not in os.environ, reason="no environment of dwcahandler")
def test_dwcahandler_takes_the_archive_and_knows_its_terms(named):
    told = run([os.environ["DWCAHANDLER_PYTHON"], "-c", DWCAHANDLER], named)
    number, unknown = told.strip().splitlines()[-1].split(maxsplit=1)
    assert int(number) > 30
    assert unknown == "[]"
