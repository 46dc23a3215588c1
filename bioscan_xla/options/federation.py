"""Options of federate: what the sites agree on, how each trains, how their models become one."""

from dataclasses import dataclass, field

from ..errors import ConfigError
from ..reads.lineages import HEADER_STYLES
from .checks import check_choices, check_least, set_list
from .training import FinetuneConfig

_LONGEST_NAME = 100


@dataclass(frozen=True)
class SiteLabelsConfig:
    """Write the classes of a site's sequences: names and counts, no sequences."""

    train: list[str] | str = ()  # type: ignore[assignment]
    """Labelled sequences: Parquet, FASTA or FASTQ; files, a glob, a folder or a URL."""

    output: str = "labels.json"
    """File to write."""

    columns: dict[str, str] = field(default_factory=dict)
    """Column names of the file, where they differ: dna_sequence=seq genus=Genus."""

    header_taxonomy: str | None = None
    """Read the lineage from FASTA headers: sintax or silva."""

    taxonomy: str | None = None
    """QIIME 2 taxonomy TSV (Feature ID, Taxon), joined by sequence id."""

    def __post_init__(self):
        """Normalise and check what needs no file."""
        set_list(self, "train")
        check_choices(self, {"header_taxonomy": (None, *HEADER_STYLES)})


@dataclass(frozen=True)
class LabelUnionConfig:
    """Join the classes of several sites; every site then trains with the result."""

    sites: list[str] | str = ()  # type: ignore[assignment]
    """The file of each site."""

    output: str = "union.json"
    """File to write."""

    min_sequences: int = 2
    """A class with fewer sequences, all sites together, is left out."""

    def __post_init__(self):
        """Normalise and check what needs no file."""
        set_list(self, "sites")
        check_least(self, {"min_sequences": 1})


@dataclass(frozen=True)
class SiteConfig(FinetuneConfig):
    """Train a site's part of a common model: fine-tuning with the classes of all sites.

    Run it again with the same options to resume from the last checkpoint.
    """

    site: str = ""
    """Name of the site, which the common model's card will give."""

    freeze_a: bool = True
    """Train only LoRA's B, which starts at zero; false only if merge --stack is to follow."""

    num_epochs: int = 1
    """Passes over the training sequences in this round."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        super().__post_init__()
        check_site_name(self.site)
        if not self.labels and not self.start:
            raise ConfigError(
                "no common classes given; pass --labels with the file of `federate labels union` "
                "in the first round, and --start with the merged model from then on"
            )


def check_site_name(name: object) -> None:
    """ConfigError unless it is some text of one line."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise ConfigError(f"{name!r} is not the name of a site; pass one as --site NAME")
    if len(name) > _LONGEST_NAME:
        raise ConfigError(f"a site's name has {len(name)} characters; at most {_LONGEST_NAME}")


@dataclass(frozen=True)
class MergeConfig:
    """Average the models of the sites, each by the sequences it was trained on."""

    sites: list[str] | str = ()  # type: ignore[assignment]
    """The folder that each site shared (or its output folder, which holds it)."""

    labels: str | None = None
    """The common classes; by default those of most sites."""

    output: str = "merged"
    """Folder for the common model; it must not exist."""

    model: str | None = None
    """Id or folder of the base model, if the sites trained on a copy in a local folder."""

    stack: bool = False
    """Put the adapters beside each other instead of averaging them: the rank adds up."""

    def __post_init__(self):
        """Normalise."""
        set_list(self, "sites")
