"""Options of classify."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..reads.lineages import RANKS
from .checks import DEVICES, INFERENCE_DTYPES, check_choices, check_least, check_shares, set_list


@dataclass(frozen=True)
class ClassifyConfig:
    """Name sequences by their nearest references, with the evidence beside each name.

    Run it again with the same options to resume: named sequences are not computed again.
    """

    input: list[str] | str = ()  # type: ignore[assignment]
    """Sequences to name: Parquet, FASTA or FASTQ; files, a glob, a folder or a URL."""

    reference: str = ""
    """Labelled sequences: a database made by embed, or a FASTA or Parquet file."""

    output: str = "classified"
    """Folder for the results."""

    model: str | None = None
    """Encoder (a folder, a Hugging Face id or bioscan-small) for candidates by vector; by default
    the one that made the reference table. Without either, only shared 8-mers find candidates."""

    frames: int | None = None
    """Reading frames of the model: 1 or 6; by default those it was trained with, or the table's."""

    strands: str | None = None
    """Strands of the model: given, or both for the mean over both; by default likewise."""

    method: str = "neighbours"
    """neighbours (aligned references decide), heads (those of a fine-tuned model alone, for which
    --reference is optional), both, or
    argmax (the best class of each head by itself, whose names may contradict each other)."""

    reference_table: str = "embeddings"
    """Table of the reference database."""

    reference_name: str | None = None
    """What to call the reference in the results; by default its file name."""

    reference_version: str | None = None
    """Version of the reference, for the results."""

    reference_columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the reference file, where they differ: dna_sequence=seq."""

    header_taxonomy: str | None = None
    """Lineage in the FASTA headers of the reference: sintax or silva."""

    candidates: str = "both"
    """vector, kmer or both: how candidates are found."""

    num_candidates: int = 50
    """Candidates by each way."""

    strand: str = "both"
    """both (the better one is taken and recorded), plus or minus."""

    min_coverage: float = 0.7
    """Share of the shorter sequence that an alignment must cover to be evidence."""

    precision: float = 0.95
    """Share of the kept names that should be right, at each rank; a lower one keeps more names."""

    threshold: dict[str, float] = dataclasses.field(default_factory=dict)
    """Least confidence at a rank, in place of what precision gives: genus=0.8 species=0.9."""

    novel_share: float = 0.2
    """Share of the sequences that you expect to be of genera that the reference lacks."""

    num_trials: int = 3000
    """References left out and named, to calibrate confidence."""

    table: str | None = None
    """Counts of each sequence by sample: TSV (QIIME 2, DADA2) or BIOM 2.1."""

    samples: list[str] = ()  # type: ignore[assignment]
    """Sample metadata, TSV or CSV, FAIRe or plain; a second file may link libraries to samples."""

    remove_controls: bool = False
    """Leave negative controls out of the counts; by default they are kept and flagged."""

    known_taxa: str | None = None
    """CSV of names with WoRMS or GBIF identifiers, used offline."""

    target_gene: str | None = None
    """Marker, such as 12S rRNA; for the Darwin Core archive where the metadata have none."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the input, where they differ: dna_sequence=seq."""

    min_length_bp: int = 30
    """Shorter sequences are rejected; nothing shorter than 30 bases can be aligned for a name."""

    max_n_fraction: float = 0.5
    """Sequences with a larger share of N are rejected."""

    device: str = "auto"
    """Where the model runs: auto, xla, cuda or cpu."""

    dtype: str | None = None
    """bfloat16, float32, or int8 (CPU only); by default that of the reference table, else bfloat16
    where the device multiplies it natively."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        set_list(self, "input")
        set_list(self, "samples")
        check_choices(
            self,
            {
                "method": ("neighbours", "heads", "both", "argmax"),
                "candidates": ("vector", "kmer", "both"),
                "frames": (None, 1, 6),
                "strands": (None, "given", "both"),
                "strand": ("both", "plus", "minus"),
                "header_taxonomy": (None, "sintax", "silva"),
                "device": DEVICES,
                "dtype": INFERENCE_DTYPES,
            },
        )
        check_least(self, {"num_candidates": 1, "num_trials": 0, "min_length_bp": 1})
        check_shares(self, ("min_coverage", "precision", "novel_share", "max_n_fraction"))
        for rank, value in self.threshold.items():
            if rank not in RANKS:
                raise ConfigError(f"threshold names {rank!r}; ranks are {', '.join(RANKS)}")
            if not 0 <= value <= 1:
                raise ConfigError(f"threshold of {rank} is {value}; it must be from 0 to 1")
        if self.method != "neighbours" and self.model and not Path(self.model).is_dir():
            raise ConfigError(f"model {self.model}: no such folder; check the path")
        has_heads = self.model is not None and (Path(self.model) / "heads.safetensors").is_file()
        if self.method != "neighbours" and not has_heads:
            raise ConfigError(
                f"method {self.method} needs the heads of a fine-tuned model; pass the output "
                "folder of fine-tuning as --model, or take --method neighbours"
            )
        if self.model is None and (self.frames or self.strands):
            raise ConfigError(
                "frames and strands are those of --model; without one the reference's own are taken"
            )
        if not self.reference and self.method not in ("heads", "argmax"):
            raise ConfigError(
                "no reference given; pass --reference with a database made by embed or a "
                "labelled FASTA or Parquet file"
            )
        if self.model is not None and self.method == "neighbours" and self.candidates == "kmer":
            raise ConfigError(
                "model finds candidates by vector, and candidates kmer uses no vectors; leave out "
                "one of the two"
            )
        for name in ("known_taxa", "target_gene"):
            if getattr(self, name) is not None and not (self.table and self.samples):
                raise ConfigError(
                    f"{name} is for the Darwin Core archive, which needs counts and samples; pass "
                    "--table and --samples too"
                )
        if self.samples and not self.table:
            raise ConfigError("samples describe the columns of a count table; pass --table too")
        if self.remove_controls and not self.samples:
            raise ConfigError(
                "--remove-controls needs --samples, which says which are controls; pass it too"
            )


@dataclass(frozen=True)
class ReferenceConfig:
    """Check a reference, or center or whiten its vectors."""

    action: str = "check"
    """What to do: check (mislabels, shared barcodes, contradictions, coverage); center or whiten
    (a second table of the same rows, with vectors centred or whitened)."""

    reference: str = ""
    """Database made by embed; for check also labelled FASTA or Parquet."""

    output: str = "reference-check"
    """Folder for the tables and the page."""

    table: str = "embeddings"
    """Table of the database."""

    to: str | None = None
    """center and whiten: name of the new table, by default centered or whitened."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the file, where they differ: dna_sequence=seq."""

    header_taxonomy: str | None = None
    """Lineage in FASTA headers: sintax or silva."""

    def __post_init__(self):
        """Check what needs no file."""
        check_choices(
            self,
            {
                "action": ("check", "center", "whiten"),
                "header_taxonomy": (None, "sintax", "silva"),
            },
        )
        if not self.reference:
            raise ConfigError("no reference given; pass a database or a labelled file")
        if self.to is not None and self.action == "check":
            raise ConfigError("to belongs to center and whiten; remove it")
        if self.to == self.table:
            raise ConfigError(f"to names the table of raw vectors, {self.table}; name another")
