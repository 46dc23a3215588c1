"""Files of a model in a message, and back into a folder.

Input: a folder or a message. Output: the other.
Invariants: a message holds only files that a site may share, and only these are written.
"""

from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from bioscan_xla.federation.share import FILES

LABELS = "labels.json"


def pack(folder: Path, names=FILES) -> RecordDict:
    """The files of a folder as the content of a message."""
    files = {name: (folder / name).read_bytes() for name in names}
    return RecordDict({"files": ConfigRecord(files)})


def unpack(content: RecordDict, folder: Path, names=FILES) -> Path:
    """Write the files that a message holds; a foreign name is passed over."""
    files = content.config_records.get("files", {})
    for name in names:
        if isinstance(value := files.get(name), bytes):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(value)
    return folder
