"""A built-in sample and a small model, so that everything can be tried without a download.

`python -m bioscan_xla.sample FOLDER` writes `sample.parquet`, `query.fasta`, a cruise to classify
(`asv.fasta`, `counts.tsv`, `samples.tsv`) and `model/`.

The sequences are simulated, not real records: substitutions are drawn along the branches of a small
taxonomy of real deep-sea names, so that close relatives have similar sequences.
The model has the architecture and vocabulary of Nucleotide Transformer with random weights.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .cli import run_command
from .encode.architecture import write_model
from .options import SAMPLE, SampleConfig
from .reads.lineages import RANKS

log = logging.getLogger(__name__)

_LINEAGES = """
Animalia;Annelida;Polychaeta;Sabellida;Siboglinidae;Riftia;Riftia pachyptila
Animalia;Annelida;Polychaeta;Sabellida;Siboglinidae;Osedax;Osedax frankpressi
Animalia;Annelida;Polychaeta;Sabellida;Siboglinidae;Osedax;Osedax rubiplumus
Animalia;Annelida;Polychaeta;Terebellida;Alvinellidae;Alvinella;Alvinella pompejana
Animalia;Annelida;Polychaeta;Phyllodocida;Polynoidae;Branchinotogluma;Branchinotogluma sandersi
Animalia;Arthropoda;Malacostraca;Decapoda;Alvinocarididae;Rimicaris;Rimicaris exoculata
Animalia;Arthropoda;Malacostraca;Decapoda;Alvinocarididae;Rimicaris;Rimicaris chacei
Animalia;Arthropoda;Malacostraca;Decapoda;Kiwaidae;Kiwa;Kiwa hirsuta
Animalia;Arthropoda;Malacostraca;Amphipoda;Alicellidae;Alicella;Alicella gigantea
Animalia;Arthropoda;Malacostraca;Isopoda;Cirolanidae;Bathynomus;Bathynomus giganteus
Animalia;Cnidaria;Anthozoa;Actiniaria;Actinostolidae;Actinostola;Actinostola callosa
Animalia;Cnidaria;Anthozoa;Scleractinia;Caryophylliidae;Desmophyllum;Desmophyllum pertusum
Animalia;Cnidaria;Anthozoa;Scleractinia;Caryophylliidae;Desmophyllum;Desmophyllum dianthus
Animalia;Cnidaria;Hydrozoa;Siphonophorae;Apolemiidae;Apolemia;Apolemia lanosa
Animalia;Chordata;Teleostei;Perciformes;Liparidae;Pseudoliparis;Pseudoliparis swirei
Animalia;Chordata;Teleostei;Perciformes;Liparidae;Careproctus;Careproctus melanurus
Animalia;Chordata;Teleostei;Ophidiiformes;Ophidiidae;Bassozetus;Bassozetus compressus
Animalia;Chordata;Teleostei;Lophiiformes;Ceratiidae;Ceratias;Ceratias holboelli
Animalia;Echinodermata;Holothuroidea;Elasipodida;Elpidiidae;Scotoplanes;Scotoplanes globosa
Animalia;Echinodermata;Holothuroidea;Elasipodida;Elpidiidae;Peniagone;Peniagone vitrea
Animalia;Echinodermata;Ophiuroidea;Ophiurida;Ophiuridae;Ophiura;Ophiura ljungmani
Animalia;Mollusca;Bivalvia;Mytilida;Mytilidae;Bathymodiolus;Bathymodiolus thermophilus
Animalia;Mollusca;Bivalvia;Mytilida;Mytilidae;Bathymodiolus;Bathymodiolus azoricus
Animalia;Mollusca;Gastropoda;Neomphalida;Peltospiridae;Chrysomallon;Chrysomallon squamiferum
""".strip().splitlines()

# Share of bases that change on the branch to a taxon of this rank, and to an individual.
_CHANGE = dict(zip(RANKS, (0.0, 0.16, 0.10, 0.08, 0.06, 0.05, 0.03), strict=True))
_CHANGE_WITHIN_SPECIES = 0.004
_MARKERS = {"COI": (658, 0.65), "12S": (170, 0.25), "18S": (1800, 0.08), "rRNA": (6400, 0.02)}
"""Length in bp and share of the records; the last is longer than one window of the model."""


def simulate(num_sequences: int = 400, seed: int = 0) -> pa.Table:
    """Simulated records with lineage, depth and position; the same for the same seed.

    Reference: substitutions after Jukes and Cantor (1969): every other base is equally likely.
    """
    rng = np.random.default_rng(seed)
    ancestors: dict[tuple[str, ...], np.ndarray] = {}

    def descend(lineage: tuple[str, ...], marker: str) -> np.ndarray:
        key = (marker, *lineage)
        if key not in ancestors:
            if lineage:
                change = _CHANGE[RANKS[len(lineage) - 1]]
                bases = _mutate(descend(lineage[:-1], marker), change, rng)
            else:
                bases = rng.integers(0, 4, _MARKERS[marker][0])
            ancestors[key] = bases
        return ancestors[key]

    names, shares = list(_MARKERS), [share for _, share in _MARKERS.values()]
    rows = []
    for number in range(num_sequences):
        lineage = tuple(_LINEAGES[number % len(_LINEAGES)].split(";"))
        marker = str(rng.choice(names, p=shares))
        bases = _mutate(descend(lineage, marker), _CHANGE_WITHIN_SPECIES, rng)
        if rng.random() < 0.15:  # an amplicon: a part of the marker
            length = int(rng.integers(len(bases) // 3, len(bases)))
            start = int(rng.integers(0, len(bases) - length + 1))
            bases = bases[start : start + length]
        sequence = "".join(np.array(list("ACGT"))[bases])
        if rng.random() < 0.1:  # a base the sequencer could not call
            place = int(rng.integers(0, len(sequence)))
            sequence = sequence[:place] + "N" + sequence[place + 1 :]
        rows.append(
            {
                "sequence_id": f"SIM{number:05d}",
                "dna_sequence": sequence,
                **dict(zip(RANKS, lineage, strict=True)),
                "depth": round(float(rng.uniform(200, 6000)), 1),
                "latitude": round(float(rng.uniform(-60, 70)), 4),
                "longitude": round(float(rng.uniform(-180, 180)), 4),
                "marker": marker,
            }
        )
    return pa.Table.from_pylist(rows)


def _mutate(bases: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    changed = rng.random(len(bases)) < share
    return np.where(changed, (bases + rng.integers(1, 4, len(bases))) % 4, bases)


def write_sample(path: str | Path, num_sequences: int = 400, seed: int = 0) -> None:
    """Write simulated records as Parquet; the last ones are unusable, as happens in real files."""
    table = simulate(num_sequences, seed)
    bad = table.slice(0, 2).to_pylist()
    bad[0] |= {"sequence_id": "SIM_EMPTY", "dna_sequence": ""}
    bad[1] |= {"sequence_id": "SIM_PROTEIN", "dna_sequence": "MKLVEEQPFWY" * 5}
    table = pa.concat_tables([table, pa.Table.from_pylist(bad, schema=table.schema)])
    pq.write_table(table, path, row_group_size=100)


def write_query(path: str | Path, num_sequences: int = 3) -> None:
    """Write new individuals of the same species as FASTA, to search the sample with."""
    records = simulate(num_sequences + len(_LINEAGES), seed=0)
    rng = np.random.default_rng(99)
    lines = []
    for record in records.slice(len(_LINEAGES)).to_pylist():
        bases = np.array(["ACGT".find(base) for base in record["dna_sequence"]]) % 4
        sequence = "".join(np.array(list("ACGT"))[_mutate(bases, 0.01, rng)])
        lines += [f">query_{record['species'].replace(' ', '_')}", sequence]
    Path(path).write_text("\n".join(lines) + "\n")


_DIVES = """
samp_name	samp_category	decimalLatitude	decimalLongitude	eventDate	minimumDepthInMeters	target_gene
dive-1	sample	44.37	-124.96	2023-04-15	210	simulated
dive-2	sample	44.52	-125.39	2023-04-16	780	simulated
dive-3	sample	44.67	-125.81	2023-04-18	1450	simulated
dive-4	sample	45.93	-129.98	2023-04-21	1540	simulated
dive-5	sample	45.02	-130.20	2023-04-22	2290	simulated
dive-6	sample	43.10	-127.60	2023-04-25	3120	simulated
blank-1	negative control	not applicable	not applicable	2023-04-25	not applicable	simulated
""".strip()  # noqa: E501
_NEW_TAXA = 6
_CHANGE_NEW = 0.12
"""Share of bases in which the sequences of no known genus differ from their nearest relative."""


def write_cruise(folder: Path, num_sequences: int = 90) -> None:
    """Write a simulated cruise: ASVs of the sample's species and a few of no known genus.

    `asv.fasta` has the sequences, `counts.tsv` the reads of each in six dives and a blank,
    `samples.tsv` position, depth and date of each.
    """
    first = 400  # the individuals of the sample itself
    records = simulate(first + num_sequences).slice(first).to_pylist()
    rng = np.random.default_rng(7)
    names = [line.split("\t")[0] for line in _DIVES.splitlines()[1:]]
    depths = [float(line.split("\t")[5]) for line in _DIVES.splitlines()[1:-1]]
    fasta, counts = [], ["\t".join(["#OTU ID", *names])]
    for number, record in enumerate(records):
        sequence = record["dna_sequence"]
        if number < _NEW_TAXA:
            bases = np.array(["ACGT".find(base) for base in sequence]) % 4
            sequence = "".join(np.array(list("ACGT"))[_mutate(bases, _CHANGE_NEW, rng)])
        name = f"ASV{number:03d}"
        fasta += [f">{name}", sequence]
        # Each species lives around a depth of its own, the same in every marker.
        home = 300 + 2900 * (_LINEAGES.index(_lineage_of(record)) * 7 % 24) / 23
        reads = [
            round(float(rng.lognormal(5, 1)) * np.exp(-(((d - home) / 900) ** 2))) for d in depths
        ]
        blank = int(rng.integers(1, 9)) if number % 30 == 11 else 0
        counts.append("\t".join([name, *map(str, reads), str(blank)]))
    (folder / "asv.fasta").write_text("\n".join(fasta) + "\n")
    (folder / "counts.tsv").write_text("\n".join(counts) + "\n")
    (folder / "samples.tsv").write_text(_DIVES + "\n")


def _lineage_of(record: dict) -> str:
    return ";".join(record[rank] for rank in RANKS)


def write_all(folder: Path, num_sequences: int = 400) -> None:
    """Write the sample, the queries, the cruise and the model into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sample(folder / "sample.parquet", num_sequences)
    write_query(folder / "query.fasta")
    write_cruise(folder)
    write_model(folder / "model")


def provide_demo(inputs: Sequence[str], model: str) -> None:
    """Write the built-in sample and model if a demo needs them and they do not exist."""
    folder = Path(SAMPLE).parent
    asked = list(inputs) == [SAMPLE] and model in (f"{folder}/model", "bioscan-small")
    if asked and not Path(SAMPLE).exists():
        log.info("writing the built-in sample and model into %s", folder.resolve())
        write_all(folder)


def _work(config: SampleConfig) -> int:
    write_all(Path(config.folder), config.num_sequences)
    print(
        f"{config.folder}: sample.parquet ({config.num_sequences} simulated sequences and 2 "
        "unusable ones), query.fasta, a cruise to classify (asv.fasta, counts.tsv, samples.tsv), "
        "model (ESM, 2 layers, random weights)"
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sample, the queries and the model into a folder; returns the exit status."""
    return run_command(
        SampleConfig, _work, arguments, "python -m bioscan_xla.sample", positionals=("folder",)
    )


if __name__ == "__main__":
    sys.exit(main())
