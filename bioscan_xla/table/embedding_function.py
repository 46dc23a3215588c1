"""The LanceDB embedding function: `table.search("ACGT...")` embeds the query like the table's rows.

Input: text. Output: vectors. Importing this module registers the function; `import bioscan_xla`
sees to that. Invariants: a query is embedded by the same model and options that made the table,
or refused. The model is loaded at the first query, from where the table's fingerprint names it.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lancedb.embeddings import EmbeddingFunction, EmbeddingFunctionRegistry, register

from ..encode.fingerprint import compare, describe
from ..errors import ModelError

if TYPE_CHECKING:
    from ..encode.encoder import Encoder
    from ..encode.runtime import Device

log = logging.getLogger(__name__)

NAME = "bioscan_xla"


@register(NAME)
class SequenceEmbedding(EmbeddingFunction):
    """Embeds DNA sequences with the model that made a table."""

    # What older tables record of their model; newer ones have it all in `fingerprint`, as JSON
    # (a mapping could not be hashed, and LanceDB hashes the function).
    model: str = ""
    revision: str = ""
    adapter: str = ""
    pooling: str = "mean"
    layer: int = -1
    dtype: str = "bfloat16"
    overlap_tokens: int = 100
    hidden: int = 2560
    fingerprint: str = ""

    def ndims(self) -> int:
        """Return the length of a vector."""
        return self.hidden

    def compute_query_embeddings(self, query: str, *args: Any, **kwargs: Any) -> list:
        """Embed one query sequence, (hidden,) float32."""
        return self.compute_source_embeddings([query])

    def compute_query_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list:
        """Embed a query, once: LanceDB's own retries for minutes, then hides the error."""
        return self.compute_query_embeddings(*args, **kwargs)

    def compute_source_embeddings_with_retry(self, *args: Any, **kwargs: Any) -> list:
        """Embed sequences, once; see above."""
        return self.compute_source_embeddings(*args, **kwargs)

    def compute_source_embeddings(self, texts: Sequence[str], *args: Any, **kwargs: Any) -> list:
        """Embed sequences, cleaned as the reader cleans them; InputError if one is unusable."""
        from ..encode.inference import embed_text

        return list(embed_text(self._encoder(), texts))

    def _encoder(self) -> "Encoder":
        if self.fingerprint:
            return load_as(json.loads(self.fingerprint))
        keys = ("model", "revision", "adapter", "pooling", "layer", "dtype", "overlap_tokens")
        return load_as({key: str(getattr(self, key)) for key in keys})


def load_as(
    made_by: Mapping[str, str],
    *,
    model: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
) -> "Encoder":
    """Load the encoder that made a table and check that it is unchanged; cached.

    Args:
        made_by: the table's fingerprint.
        model: where the model is now; None looks where it was.
        adapter: where the adapter is now; None looks where it was.
        device: where to compute.

    Raises:
        ModelError: the model or adapter does not exist, or would give other vectors; the message
            lists the differences.
    """
    return _load(tuple(sorted(made_by.items())), model, adapter, device)


@functools.lru_cache(maxsize=1)
def _load(
    items: tuple[tuple[str, str], ...], model: str | None, adapter: str | None, device: str
) -> "Encoder":
    from ..encode.runtime import open_device

    made_by = dict(items)
    return load_again(made_by, open_device(device, made_by["dtype"]), model, adapter)


def load_again(
    made_by: Mapping[str, str],
    device: "Device",
    model: str | None = None,
    adapter: str | None = None,
    **options: Any,
) -> "Encoder":
    """What `load_as` does, on an open device and each time anew.

    Args:
        made_by: the table's fingerprint.
        device: where to compute.
        model: where the model is now; None looks where it was.
        adapter: where the adapter is now; None looks where it was.
        **options: further ones of `load_encoder`.

    Raises:
        ModelError: as `load_as`.
    """
    from ..encode.encoder import load_encoder

    for word, given in (("model", model), ("adapter", adapter)):
        before = made_by.get(word, "")
        if not given and Path(before).is_absolute() and not Path(before).is_dir():
            raise ModelError(
                f"the table was made with the {word} in {before}, which no longer exists. Name the "
                f"folder where it is now: --{word} FOLDER"
            )
    if adapter and not made_by.get("adapter"):
        raise ModelError("the table was made without an adapter; remove --adapter")
    encoder = load_encoder(
        model or made_by["model"],
        device=device,
        # Another name has other commits.
        revision=made_by.get("revision") or None if model in (None, made_by["model"]) else None,
        adapter=adapter or made_by.get("adapter") or None,
        pooling=made_by["pooling"],
        layer=int(made_by["layer"]),
        overlap_tokens=int(made_by["overlap_tokens"]),
        frames=int(made_by.get("frames", 1)),
        strands=made_by.get("strands", "given"),
        transform=made_by.get("transform_file"),
        **options,
    )
    compared = compare(made_by, encoder.fingerprint)
    if compared.different:
        lines = describe(
            compared.different, made_by, encoder.fingerprint, ("the table", "the search")
        )
        raise ModelError(
            "this is not the model that made the table, and distances between their vectors "
            "are meaningless:\n"
            + "\n".join(lines)
            + "\nSearch with the original model (--model FOLDER, --adapter FOLDER), or embed the "
            "sequences again into another table"
        )
    if compared.unknown:
        log.warning(
            "the table is from an older release; these could not be compared: %s",
            ", ".join(compared.unknown),
        )
    return encoder


def column_metadata(fingerprint: Mapping[str, str], hidden: int) -> dict[bytes, bytes]:
    """Arrow schema metadata that ties the function to the columns of a table."""
    function = {
        "name": NAME,
        "model": {"hidden": hidden, "fingerprint": json.dumps(dict(fingerprint))},
        "source_column": "dna_sequence",
        "vector_column": "vector",
    }
    return {b"embedding_functions": json.dumps([function]).encode()}


assert EmbeddingFunctionRegistry.get_instance().get(NAME) is SequenceEmbedding
