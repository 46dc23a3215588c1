"""Options of the commands that copy and write files."""

from dataclasses import dataclass

from .checks import check_least


@dataclass(frozen=True)
class SyncConfig:
    """Copy files and LanceDB tables from one place to another.

    Run it again to resume after an interruption: files already there are not copied again.
    """

    source: str
    """A folder or file, gs://, s3://, or an rclone remote (drive:folder)."""

    destination: str
    """A folder, gs://, s3://, or an rclone remote; a copied file keeps its name."""

    delete: bool = False
    """Delete at the destination what the source does not have."""

    dry_run: bool = False
    """Only report what would be copied and deleted."""


@dataclass(frozen=True)
class SampleConfig:
    """Write the built-in sample, some queries and a small model into a folder."""

    folder: str
    """Folder for the sample, queries, a cruise to classify and `model/`."""

    num_sequences: int = 400
    """Simulated sequences in the sample."""

    def __post_init__(self):
        """Check what needs no file."""
        check_least(self, {"num_sequences": 1})
