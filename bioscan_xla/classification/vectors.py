"""Vectors of queries and references by one encoder.

Input: the requested model, or the reference table's own. Output: an encoder, and the
reference with vectors of that encoder. Invariants: queries and references are never compared by
vectors of two encoders; vectors of a file are computed once and kept beside it.
"""

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..encode.fingerprint import compare
from ..errors import ModelError
from ..options import ClassifyConfig
from .reference import Reference

if TYPE_CHECKING:
    from ..encode.encoder import Encoder

log = logging.getLogger(__name__)


def prepare_vectors(
    config: ClassifyConfig, reference: Reference, encoder: "Encoder | None" = None
) -> tuple["Encoder | None", Reference]:
    """Load the encoder, and give the reference vectors of it.

    Args:
        config: options.
        reference: of the queries.
        encoder: where it is loaded already.

    Returns:
        None and a reference without vectors where only words are to be used.

    Raises:
        ModelError: the model cannot be loaded, or vectors were asked for and there is none.
    """
    needs_model = config.method != "neighbours"
    if (not needs_model and config.candidates == "kmer") or (
        encoder is None and config.model is None and reference.vectors is None
    ):
        if config.candidates == "vector":
            raise ModelError(
                "candidates by vector need a model: pass --model, or a reference table made by "
                "embed, or use --candidates kmer"
            )
        log.info("candidates are found by shared 8-mers; no model is used")
        return None, replace(reference, vectors=None)
    encoder = encoder or _load(config, reference)
    if needs_model:
        _check_heads(config.model or "", encoder)
    if config.candidates == "kmer" or not reference.ids:
        return encoder, replace(reference, vectors=None)
    made_by = reference.fingerprint or {}
    if not needs_model:
        from ..encode.encoder import transformed_alike

        encoder = transformed_alike(encoder, made_by)
    if reference.vectors is not None and not compare(made_by, encoder.fingerprint).different:
        return encoder, reference
    if reference.vectors is not None:
        why = "made by another model or in another way"
        if needs_model and "transform" in made_by:
            why = "transformed, and heads need vectors as they are"
        log.info("the reference table is %s; its sequences are embedded again", why)
    vectors = _kept_vectors(encoder, reference, cache_folder(config))
    return encoder, reference.with_vectors(vectors, dict(encoder.fingerprint))


def _load(config: ClassifyConfig, reference: Reference) -> "Encoder":
    if config.model is None:
        from ..table.embedding_function import load_as

        made_by = reference.fingerprint or {}
        if config.dtype not in (None, made_by.get("dtype")):
            raise ModelError(
                f"dtype {config.dtype}: {config.reference} was embedded in {made_by.get('dtype')}; "
                "leave out --dtype, or pass --model too, and its sequences are embedded again"
            )
        return load_as(made_by, device=config.device)
    from ..encode.encoder import load_encoder
    from ..encode.model_files import split_finetuned
    from ..encode.runtime import open_device

    # In the table's own type its vectors can be used as they are.
    device = open_device(config.device, config.dtype or (reference.fingerprint or {}).get("dtype"))
    base, revision, adapter = split_finetuned(config.model)
    return load_encoder(
        base,
        device=device,
        revision=revision,
        adapter=adapter,
        frames=config.frames,
        strands=config.strands,
    )


def _check_heads(model: str, encoder: "Encoder") -> None:
    """Refuse to read heads in another way than they were trained."""
    from ..encode.model_files import adapter_reading
    from ..training.classifier import POOLING

    trained: dict[str, Any] = {"frames": 1, "strands": "given"} | adapter_reading(model)
    trained |= {"pooling": POOLING, "layer": "-1"}
    made = encoder.fingerprint
    is_last = made["layer"] == str(encoder.model.config.num_hidden_layers)
    read = {
        "frames": encoder.frames,
        "strands": encoder.strands,
        "pooling": encoder.pooling,
        "layer": "-1" if is_last else made["layer"],
    }
    for word, value in read.items():
        if value != trained[word]:
            raise ModelError(
                f"{model}: its heads were trained with {word} {trained[word]} and cannot be read "
                f"with {word} {value}; leave out --{word}, or take --method neighbours, which "
                "uses the vectors only"
            )


def cache_folder(config: ClassifyConfig) -> Path:
    """Where what belongs to a reference is kept: beside it, else in the output folder."""
    beside = Path(config.reference.rstrip("/") + ".classify")
    if config.reference and "://" not in config.reference and os.access(beside.parent, os.W_OK):
        return beside
    return Path(config.output) / "reference"


def _kept_vectors(encoder: "Encoder", reference: Reference, folder: Path) -> np.ndarray:
    from ..encode.inference import embed_sequences

    key = hashlib.sha256(
        json.dumps(
            [reference.content_hash, dict(encoder.fingerprint)],
            sort_keys=True,
        ).encode()
    ).hexdigest()[:16]
    path = folder / f"vectors-{key}.npy"
    if path.is_file():
        return np.load(path)
    log.info("embedding %d references; their vectors are kept for the next run", len(reference.ids))
    vectors = embed_sequences(encoder, reference.sequences).astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with open(temporary, "wb") as file:
        np.save(file, vectors)
    os.replace(temporary, path)
    return vectors
