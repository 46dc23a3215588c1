"""The bodies of requests, as the OpenAPI page shows them.

Input: JSON. Output: checked records. Invariants: an unknown field is an error; sequences are
checked later, by the reader's rules.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_EXAMPLE = "ACGTTGCATGCCATTGACCTAGGATCCAAGTCGATTACGCTAGCTAACGGTT"
_OTHER = "TTGACCATGCAAGTCGAACGGTAACAGGAAGAAGCTTGCTTCTTTGCTGAC"

Input = Annotated[
    str | list[str],
    Field(description="A sequence or a list of sequences: DNA or RNA, IUPAC codes, gaps ignored."),
]
Model = Annotated[
    str | None,
    Field(description="A name, or a name with a fingerprint; by default the first model."),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EmbeddingsRequest(_Body):
    """What OpenAI's clients send."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"input": [_EXAMPLE, _OTHER], "model": "bioscan-small"},
                {"input": _EXAMPLE, "model": "bioscan-small", "encoding_format": "base64"},
            ]
        },
    )
    input: Input
    model: Model = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[
        int | None, Field(description="Only the length of the model's vectors is accepted.")
    ] = None
    user: Annotated[str | None, Field(description="Ignored.")] = None


class ClassifyRequest(_Body):
    """Sequences to name."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"input": [_EXAMPLE], "evidence": True}]}
    )
    input: Input
    model: Model = None
    strand: Annotated[
        Literal["both", "plus", "minus"], Field(description="both takes the better one.")
    ] = "both"
    evidence: Annotated[bool, Field(description="Add the most identical references.")] = True


class SearchRequest(_Body):
    """Sequences whose nearest rows are wanted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"input": [_EXAMPLE], "k": 5, "where": "depth > 1000 AND phylum = 'Cnidaria'"}
            ]
        },
    )
    input: Input
    model: Model = None
    k: Annotated[int, Field(ge=1, description="Rows for each sequence.")] = 10
    where: Annotated[
        str | None,
        Field(
            max_length=2000,
            description="SQL condition: columns, literals, comparisons, IN, BETWEEN, LIKE, IS NULL,"
            " AND, OR, NOT.",
        ),
    ] = None


class LoadRequest(_Body):
    """A model to load beside those that are served."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"name": "coi", "model": "/models/coi-2026-11"}]},
    )
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^@/\s]+$")]
    model: Annotated[str | None, Field(description="Folder, Hugging Face id or bioscan-small.")] = (
        None
    )
    adapter: Annotated[str | None, Field(description="Folder of a LoRA adapter.")] = None
    reference: Annotated[
        str | None, Field(description="Labelled sequences; by default those of the server.")
    ] = None


class JobRequest(_Body):
    """Files to embed or to name in the background."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"kind": "embed", "input": "/data/reads.fasta", "output": "/data/vectors.db"}
            ]
        },
    )
    kind: Literal["embed", "classify"]
    input: Annotated[str | list[str], Field(description="Files, globs, folders or URLs.")]
    output: Annotated[str, Field(description="embed: a database; classify: a folder.")]
    model: Model = None
