"""The LanceDB embedding function: lets `table.search("ACGT...")` embed its query as the table was.

Enters: text. Leaves: vectors. Importing this module registers the function; `import bioscan_xla`
does that. The model is loaded at the first query, from where the table's fingerprint names it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lancedb.embeddings import EmbeddingFunction, EmbeddingFunctionRegistry, register

NAME = "bioscan_xla"


@register(NAME)
class SequenceEmbedding(EmbeddingFunction):
    """Embeds DNA sequences with the model that made a table."""

    model: str
    revision: str = ""
    adapter: str = ""
    pooling: str = "mean"
    layer: int = -1
    dtype: str = "bfloat16"
    overlap_tokens: int = 100
    hidden: int = 2560

    def ndims(self) -> int:
        """Return the length of a vector."""
        return self.hidden

    def compute_query_embeddings(self, query: str, *args: Any, **kwargs: Any) -> list:
        """Embed one query sequence, (hidden,) float32."""
        return self.compute_source_embeddings([query])

    def compute_source_embeddings(self, texts: Sequence[str], *args: Any, **kwargs: Any) -> list:
        """Embed sequences, cleaned as the reader cleans them; InputError if one is unusable."""
        from ..encode.inference import embed_text

        return list(embed_text(self._encoder(), texts))

    def _encoder(self) -> Any:
        return load_as(
            self.model,
            self.revision,
            self.adapter,
            self.pooling,
            self.layer,
            self.dtype,
            self.overlap_tokens,
        )


@functools.lru_cache(maxsize=1)
def load_as(
    model: str,
    revision: str,
    adapter: str,
    pooling: str,
    layer: int,
    dtype: str,
    overlap_tokens: int,
    device: str = "auto",
) -> Any:
    """Load the encoder that a table's fingerprint describes, once a process."""
    from ..encode.encoder import load_encoder
    from ..encode.runtime import open_device

    return load_encoder(
        model,
        device=open_device(device, dtype),
        revision=revision or None,
        adapter=adapter or None,
        pooling=pooling,
        layer=layer,
        overlap_tokens=overlap_tokens,
    )


def column_metadata(fingerprint: Mapping[str, str], hidden: int) -> dict[bytes, bytes]:
    """Arrow schema metadata that ties the function to the columns of a table."""
    parameters = {
        key: fingerprint[key] for key in ("model", "revision", "adapter", "pooling", "dtype")
    }
    numbers = {key: int(fingerprint[key]) for key in ("layer", "overlap_tokens")}
    function = {
        "name": NAME,
        "model": parameters | numbers | {"hidden": hidden},
        "source_column": "dna_sequence",
        "vector_column": "vector",
    }
    return {b"embedding_functions": json.dumps([function]).encode()}


assert EmbeddingFunctionRegistry.get_instance().get(NAME) is SequenceEmbedding
