"""The bodies of answers, and examples of them for the OpenAPI page.

Input: a row of `classification.record.SCHEMA`. Output: what a client gets.
Invariants: a rank without a name is null.
"""

from collections.abc import Mapping
from typing import Any

from ..reads.lineages import RANKS

DESCRIPTION = """Vectors, names and neighbours of DNA sequences.

`/v1/embeddings` speaks OpenAI's protocol: any of its clients works. Where the server has a key,
send it as `Authorization: Bearer KEY`. Errors look like OpenAI's: `{"error": {"message", "type",
"param", "code"}}`. 422 names the sequence that cannot be used; 429, for a full queue, comes with
Retry-After. The header `x-timeout-seconds` shortens the deadline of a request."""

_USAGE = {"prompt_tokens": 20, "total_tokens": 20}
_ID = "bioscan-small@0123456789ab"
_HIT = {
    "reference_id": "r17",
    "lineage": "Animalia;Chordata;Teleostei;Gadiformes;Macrouridae;Coryphaenoides;armatus",
    "identity": 0.994,
    "query_coverage": 1.0,
}
_EXAMPLES: dict[str, Any] = {
    "embeddings": {
        "object": "list",
        "model": _ID,
        "data": [{"object": "embedding", "index": 0, "embedding": [0.12, -0.5, 0.33]}],
        "usage": _USAGE,
    },
    "classify": {
        "object": "list",
        "model": _ID,
        "data": [
            {
                "object": "classification",
                "index": 0,
                "lineage": {"kingdom": "Animalia", "genus": "Coryphaenoides", "species": None},
                "confidence": {"kingdom": 1.0, "genus": 0.98, "species": 0.61},
                "assigned_rank": "genus",
                "novelty": {"probability": 0.03, "rank": None, "statement": None},
                "evidence": {"identity": 0.994, "hits": [_HIT]},
            }
        ],
        "usage": _USAGE,
    },
    "search": {
        "object": "list",
        "model": _ID,
        "data": [
            {
                "object": "search_result",
                "index": 0,
                "rows": [{"distance": 0.012, "sequence_id": "r17", "depth": 2210.0}],
            }
        ],
        "usage": _USAGE,
    },
    "models": {
        "object": "list",
        "data": [
            {
                "id": _ID,
                "object": "model",
                "created": 1764028800,
                "owned_by": "bioscan_xla",
                "name": "bioscan-small",
                "current": True,
                "vector_length": 256,
            }
        ],
    },
}


def example_of(name: str) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI page shows for an answer."""
    return {200: {"content": {"application/json": {"example": _EXAMPLES[name]}}}}


def describe_name(index: int, row: Mapping[str, Any], with_evidence: bool) -> dict[str, Any]:
    """The answer for one sequence of /v1/classify."""
    result: dict[str, Any] = {
        "object": "classification",
        "index": index,
        "lineage": {rank: row[rank] for rank in RANKS},
        "best_lineage": {rank: row[f"best_{rank}"] for rank in RANKS},
        "confidence": {rank: row[f"confidence_{rank}"] for rank in RANKS},
        "assigned_rank": row["assigned_rank"],
        "assigned_confidence": row["confidence"],
        "novelty": {
            "probability": row["novelty"],
            "rank": row["novelty_rank"],
            "statement": row["novelty_statement"],
            "trust": row["novelty_trust"],
        },
        "tied": {"rank": row["tied_rank"], "lineages": row["tied_lineages"]},
        "strand": row["strand"],
        "length_bp": row["length_bp"],
    }
    if with_evidence:
        keys = ("identity", "query_coverage", "num_candidates", "num_evidence", "hits")
        result["evidence"] = {key: row[key] for key in keys}
    return result
