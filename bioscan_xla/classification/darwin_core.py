"""A Darwin Core archive: occurrences of sequences in samples, with the DNA-derived extension.

Input: classified rows, counts, samples, identifiers of known taxa. Output: `dwca.zip`.
Invariants: every occurrence has the terms that GBIF and OBIS require, and an id of its own, so that
equal sequences of a sample are one; a sample without position or date, and a control of any kind,
makes no occurrence and is counted; an unknown name is `incertae sedis`, and what the classifier
said stands in verbatimIdentification.

Reference: https://docs.gbif.org/publishing-dna-derived-data and https://manual.obis.org/dna_data
"""

import csv
import hashlib
import io
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from ..errors import InputError
from ..reads.lineages import RANKS
from .counts import Counts, table_lines
from .formats import Row, known_part, names_of
from .record import lineage_text
from .samples import Sample

_DWC = "http://rs.tdwg.org/dwc/terms/"
_GBIF = "http://rs.gbif.org/terms/"
_MIXS = "https://w3id.org/mixs/"

CORE = (
    "occurrenceID",
    "eventID",
    "basisOfRecord",
    "occurrenceStatus",
    "eventDate",
    "decimalLatitude",
    "decimalLongitude",
    "geodeticDatum",
    "minimumDepthInMeters",
    "maximumDepthInMeters",
    "scientificName",
    "scientificNameID",
    "taxonRank",
    "kingdom",
    "phylum",
    "class",
    "order",
    "family",
    "genus",
    "taxonID",
    "verbatimIdentification",
    "identificationRemarks",
    "organismQuantity",
    "organismQuantityType",
    "sampleSizeValue",
    "sampleSizeUnit",
    "materialSampleID",
    "associatedSequences",
)
"""Terms of the occurrence core, all of the namespace http://rs.tdwg.org/dwc/terms/."""

EXTENSION = {
    "DNA_sequence": f"{_GBIF}dna_sequence",
    "target_gene": f"{_MIXS}0000044",
    "target_subfragment": f"{_MIXS}0000045",
    "pcr_primer_forward": f"{_GBIF}pcr_primer_forward",
    "pcr_primer_reverse": f"{_GBIF}pcr_primer_reverse",
    "pcr_primer_name_forward": f"{_GBIF}pcr_primer_name_forward",
    "pcr_primer_name_reverse": f"{_GBIF}pcr_primer_name_reverse",
    "pcr_primer_reference": f"{_GBIF}pcr_primer_reference",
    "seq_meth": f"{_MIXS}0000050",
    "otu_class_appr": f"{_MIXS}0000085",
    "otu_seq_comp_appr": f"{_MIXS}0000086",
    "otu_db": f"{_MIXS}0000087",
    "env_broad_scale": f"{_MIXS}0000012",
    "env_local_scale": f"{_MIXS}0000013",
    "env_medium": f"{_MIXS}0000014",
}
"""Terms of the DNA-derived extension and their URIs."""

_ROW_TYPE = f"{_GBIF}1.0/DNADerivedData"
_INCERTAE_SEDIS = ("incertae sedis", "urn:lsid:marinespecies.org:taxname:12")
_READS = "DNA sequence reads"
_TO_FILL_IN = "to be filled in before publication"


def read_known_taxa(path: str) -> dict[str, str]:
    """Identifiers by name, of a CSV or TSV.

    The name is in `scientificName`, `name` or `taxon`; the identifier in `scientificNameID`,
    `AphiaID` (WoRMS) or `taxonKey` (GBIF).

    Raises:
        InputError: it cannot be read or lacks a column.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; check the path of --known-taxa")
    lines = table_lines(path)
    header = next(lines, [])
    columns = {name.strip().lower(): at for at, name in enumerate(header)}
    name = next((columns[n] for n in ("scientificname", "name", "taxon") if n in columns), None)
    makes = {
        "scientificnameid": "{}",
        "aphiaid": "urn:lsid:marinespecies.org:taxname:{}",
        "taxonkey": "https://www.gbif.org/species/{}",
    }
    key = next((k for k in makes if k in columns), None)
    if name is None or key is None:
        raise InputError(
            f"{path}: needs a column scientificName and one of scientificNameID, AphiaID or "
            f"taxonKey; it has {', '.join(header) or 'no header'}"
        )
    last = max(name, columns[key])
    pairs = [(row[name].strip(), row[columns[key]].strip()) for row in lines if len(row) > last]
    return {taxon: makes[key].format(found) for taxon, found in pairs if found}


def write_archive(
    path: Path,
    rows: Callable[[], Iterable[Row]],
    counts: Counts,
    row_of: Mapping[str, int],
    samples: Sequence[Sample],
    *,
    method: str,
    reference: str,
    known_taxa: Mapping[str, str],
    target_gene: str | None,
    title: str,
) -> dict[str, int]:
    """Write the archive.

    Args:
        path: of the archive.
        rows: gives the classified rows, each time it is called.
        counts: reads.
        row_of: row of `counts` by sequence_id.
        samples: of the columns of `counts`.
        method: how names were given.
        reference: what they were compared to.
        known_taxa: identifiers by name.
        target_gene: the marker, where the samples do not tell it.
        title: of the data set.

    Returns:
        `occurrences` written, and how many were left out: `of_controls`, and `without_place`
        (sample without position or date).
    """
    totals = np.asarray(counts.matrix.sum(0)).ravel()
    places = _rows_by_sequence(rows(), row_of)
    tally = {"occurrences": 0, "of_controls": 0, "without_place": 0}
    with ExitStack() as files:
        archive = files.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED))
        # A zip takes one file at a time.
        extension = files.enter_context(
            tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", dir=path.parent)
        )
        write_extension = csv.writer(extension, delimiter="\t", lineterminator="\n")
        write_extension.writerow(["coreid", *EXTENSION])
        with io.TextIOWrapper(archive.open("occurrence.txt", "w"), "utf-8", newline="") as core:
            write_core = csv.writer(core, delimiter="\t", lineterminator="\n")
            write_core.writerow(CORE)
            for row in rows():
                same = places.pop(_digest(row), ()) if row["sequence_id"] in row_of else ()
                taxon = _taxon(row, known_taxa, method, reference) if same else {}
                for column, reads in _add_up(counts, same):
                    sample = samples[column]
                    reason = _reason_to_leave_out(sample)
                    if reason:
                        tally[reason] += 1
                        continue
                    tally["occurrences"] += 1
                    found = (
                        taxon
                        | _event(sample)
                        | {
                            "occurrenceID": f"{sample.name}:{taxon['taxonID']}",
                            "organismQuantity": reads,
                            "sampleSizeValue": int(totals[column]),
                        }
                    )
                    write_core.writerow([_cell(found.get(term)) for term in CORE])
                    dna = _dna(row, sample, method, reference, target_gene)
                    write_extension.writerow(
                        [found["occurrenceID"], *[_cell(dna.get(term)) for term in EXTENSION]]
                    )
        extension.flush()
        archive.write(extension.name, "dnaderiveddata.txt")
        archive.writestr("meta.xml", _meta())
        archive.writestr("eml.xml", _eml(title, method, reference))
    return tally


def _digest(row: Row) -> str:
    return hashlib.md5(row["dna_sequence"].encode()).hexdigest()


def _rows_by_sequence(rows: Iterable[Row], row_of: Mapping[str, int]) -> dict[str, list[int]]:
    """Rows of the counts that are one sequence, such as the two strands of it: one taxonID."""
    result: dict[str, list[int]] = {}
    for row in rows:
        if row["sequence_id"] in row_of:
            result.setdefault(_digest(row), []).append(row_of[row["sequence_id"]])
    return result


def _add_up(counts: Counts, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Columns in which some rows have reads, and how many they have together."""
    result: Counter[int] = Counter()
    matrix = counts.matrix
    for row in rows:
        part = slice(matrix.indptr[row], matrix.indptr[row + 1])
        result.update(
            dict(zip(matrix.indices[part].tolist(), matrix.data[part].tolist(), strict=True))
        )
    return [(column, reads) for column, reads in sorted(result.items()) if reads]


def _cell(value: object) -> str:
    return "" if value is None else " ".join(str(value).split())


def _reason_to_leave_out(sample: Sample) -> str | None:
    if sample.is_control or sample.is_positive_control:
        return "of_controls"
    if sample.latitude is None or sample.longitude is None or sample.date is None:
        return "without_place"
    return None


def _taxon(row: Row, known_taxa: Mapping[str, str], method: str, reference: str) -> dict:
    names = known_part(names_of(row))
    name, identifier = (names[-1], known_taxa.get(names[-1] or "")) if names else _INCERTAE_SEDIS
    said = lineage_text(names_of(row, "best_"))
    confidence = row["confidence"]
    hit = row["hits"][0] if row["hits"] else None
    remarks = [method]
    remarks.append(
        f"confidence {confidence:.2f} at {row['assigned_rank']}"
        if confidence is not None
        else "no rank reaches the required confidence"
    )
    if hit:
        remarks.append(
            f"nearest {hit['reference_id']}, identity {100 * hit['identity']:.1f} %, "
            f"coverage {100 * hit['query_coverage']:.0f} %"
        )
    if row["novelty_statement"]:
        remarks.append(row["novelty_statement"])
    remarks.append(f"against {reference}")
    return {
        "basisOfRecord": "MaterialSample",
        "occurrenceStatus": "present",
        "geodeticDatum": "WGS84",
        "scientificName": name,
        "scientificNameID": identifier,
        "taxonRank": row["assigned_rank"],
        **{rank: row[rank] for rank in RANKS[:-1]},
        "taxonID": f"ASV:{_digest(row)}",
        "verbatimIdentification": said or "unidentified",
        "identificationRemarks": "; ".join(remarks),
        "organismQuantityType": _READS,
        "sampleSizeUnit": _READS,
    }


def _event(sample: Sample) -> dict:
    return {
        "eventID": sample.name,
        "eventDate": sample.date,
        "decimalLatitude": sample.latitude,
        "decimalLongitude": sample.longitude,
        "minimumDepthInMeters": sample.min_depth_m,
        "maximumDepthInMeters": sample.max_depth_m,
        "materialSampleID": sample.fields.get("materialSampleID") or sample.fields.get("samp_name"),
        "associatedSequences": sample.fields.get("associatedSequences"),
    }


def _dna(row: Row, sample: Sample, method: str, reference: str, target_gene: str | None) -> dict:
    told = {term: sample.fields.get(term) for term in EXTENSION}
    return told | {
        "DNA_sequence": row["dna_sequence"],
        "target_gene": target_gene or told["target_gene"],
        "otu_seq_comp_appr": method,
        "otu_db": reference,
    }


def _meta() -> str:
    def fields(terms: Iterable[str]) -> str:
        return "\n".join(
            f'    <field index="{at}" term={quoteattr(term)}/>' for at, term in enumerate(terms, 1)
        )

    head = (
        'encoding="UTF-8" fieldsTerminatedBy="\\t" linesTerminatedBy="\\n" fieldsEnclosedBy=\'"\''
    )
    core = "\n".join(
        f'    <field index="{at}" term={quoteattr(_DWC + term)}/>' for at, term in enumerate(CORE)
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<archive xmlns="http://rs.tdwg.org/dwc/text/" metadata="eml.xml">
  <core {head} ignoreHeaderLines="1" rowType="{_DWC}Occurrence">
    <files><location>occurrence.txt</location></files>
    <id index="0"/>
{core}
  </core>
  <extension {head} ignoreHeaderLines="1" rowType="{_ROW_TYPE}">
    <files><location>dnaderiveddata.txt</location></files>
    <coreid index="0"/>
{fields(EXTENSION.values())}
  </extension>
</archive>
"""


def _eml(title: str, method: str, reference: str) -> str:
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<eml:eml xmlns:eml="https://eml.ecoinformatics.org/eml-2.2.0"
  packageId="bioscan_xla" system="local">
  <dataset>
    <title>{escape(title)}</title>
    <creator><organizationName>{_TO_FILL_IN}</organizationName></creator>
    <abstract><para>Occurrences of DNA sequences. Names by {escape(method)} against \
{escape(reference)}.</para></abstract>
    <intellectualRights><para>{_TO_FILL_IN}</para></intellectualRights>
    <contact><organizationName>{_TO_FILL_IN}</organizationName></contact>
  </dataset>
</eml:eml>
"""
