"""The files of a model, on this machine or on the hub, before anything is loaded from them.

Input: a model id or folder, an adapter. Output: paths, contents, the commit they come from.
Invariants: a damaged file, or a vocabulary other than the built-in one, is refused with the name of
the file and the first difference.
"""

import json
import logging
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils.hub import cached_file, extract_commit_hash

from ..errors import ModelError, first_line
from ..options import DEFAULT_MODEL
from ..reads.tokens import VOCABULARY

log = logging.getLogger(__name__)

_SPECIAL = {
    "cls_token": "<cls>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}


SHIPPED = ("bioscan-small",)
"""Models shipped with the package."""

READING = "reading.json"
TRAINED = "trained.json"
"""File of an adapter's folder: the frames and strands that it was trained with."""


def locate(model: str) -> str:
    """The folder of a model shipped with the package, `~` written out; other names unchanged."""
    folder = Path(__file__).parents[1] / "weights" / model
    if model in SHIPPED and not Path(model).is_dir():
        return str(folder)
    return str(Path(model).expanduser()) if model.startswith("~") else model


def is_on_hub(name: str) -> bool:
    """Whether a name that is no folder can be that of a model on the hub: `owner/name`.

    Everything else is a path: it is absolute, begins with `.` or `~`, has other than one slash, or
    its first part is a folder here.
    """
    owner, slash, rest = name.partition("/")
    is_id = bool(owner and slash and rest) and "/" not in rest and "\\" not in name
    return is_id and owner[0] not in ".~" and not Path(owner).is_dir()


def is_offline() -> bool:
    """Whether the hub cannot be asked: its name does not resolve, or the user forbids it.

    Asking all the same would take half a minute to fail. A proxy resolves names by itself.
    """
    if constants.HF_HUB_OFFLINE:
        return True
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return True
    return False


def find_file(model: str, name: str, revision: str | None) -> Path | None:
    """A file of a model folder or of a hub model; None where there is none."""
    model = locate(model)
    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    if not is_on_hub(model):
        return None
    try:
        found = cached_file(
            model,
            name,
            revision=revision,
            local_files_only=is_offline(),
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model; ModelError if it cannot be read or is not a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{path}: not valid JSON ({first_line(error)}); download the file again"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object; download the file again")
    return content


def check_vocabulary(model: str, revision: str | None = None) -> None:
    """Compare a model's vocabulary with the built-in one, which is always used.

    Raises:
        ModelError: they differ; the message names the file and the first difference.
    """
    compared = False
    if path := find_file(model, "vocab.txt", revision):
        theirs = path.read_text(encoding="utf-8", errors="replace").split("\n")
        while theirs and not theirs[-1].strip():
            theirs.pop()
        _compare_vocabulary(path, dict(enumerate(word.strip() for word in theirs)))
        compared = True
    if path := find_file(model, "tokenizer.json", revision):
        content = read_json(path)
        kept = content.get("model")
        vocabulary = kept.get("vocab") if isinstance(kept, dict) else None
        added = content.get("added_tokens") or []
        if isinstance(vocabulary, dict) and isinstance(added, list):
            known = {number: word for word, number in vocabulary.items()}
            for item in added:
                if isinstance(item, dict):
                    known[item.get("id")] = item.get("content")
            _compare_vocabulary(path, known)
            compared = True
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if path := find_file(model, name, revision):
            content = read_json(path)
            for key, ours in _SPECIAL.items():
                word = content.get(key, ours)
                word = word.get("content") if isinstance(word, dict) else word
                if word != ours:
                    raise ModelError(_other_vocabulary(path, f"{key} is {word!r}, not {ours!r}"))
    if not compared:
        log.info(
            "model %s has no vocabulary file; that of Nucleotide Transformer is assumed", model
        )


def _compare_vocabulary(path: Path, theirs: dict[Any, Any]) -> None:
    # The published file ends in an <eos> beyond the model's 4,105 tokens, which is never used.
    for number, ours in enumerate(VOCABULARY):
        if theirs.get(number) != ours:
            there = repr(theirs[number]) if number in theirs else "missing"
            raise ModelError(_other_vocabulary(path, f"token {number} is {there}, not {ours!r}"))


def _other_vocabulary(path: Path, difference: str) -> str:
    return (
        f"{path}: not the vocabulary of Nucleotide Transformer version 1: {difference}. "
        "Every vector would be wrong; use the published file, or a model with its vocabulary"
    )


def share_weights(folder: Path) -> None:
    """Let whoever may read a folder read its safetensors files, which are written for the owner.

    Their library gives them the mode of temporary files, 0600, whatever the umask is.
    """
    readers = folder.stat().st_mode & 0o666
    for path in folder.rglob("*.safetensors"):
        path.chmod(readers)


def check_safetensors(folder: Path) -> None:
    """Compare the length of each safetensors file of a folder with its header.

    Raises:
        ModelError: one cannot be read, is truncated or no safetensors file; the message names it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                text = file.read(length) if length <= size - 8 else b""
        except OSError as error:
            raise ModelError(
                f"{path}: cannot be read ({error.strerror}); check its permissions"
            ) from error
        try:
            tensors = json.loads(text).items()
            end = max(v["data_offsets"][1] for k, v in tensors if k != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path}: its header is truncated or damaged ({size:,} bytes); copy or download "
                "the file again"
            ) from error
        if size != end + 8 + length:
            raise ModelError(
                f"{path}: truncated, with {size:,} of the {end + 8 + length:,} bytes that its "
                "header declares. Copy or download the file again"
            )


def adapter_base(adapter: str) -> tuple[str | None, str | None]:
    """The model that an adapter was trained on and its commit; None where not recorded.

    Args:
        adapter: folder of a PEFT adapter, output folder of fine-tuning, or an id on the hub.
    """
    path = find_file(adapter_folder(adapter), "adapter_config.json", None)
    if path is None:
        return None, None
    raw = read_json(path)
    return raw.get("base_model_name_or_path") or None, raw.get("revision") or None


def adapter_reading(adapter: str) -> dict[str, Any]:
    """Frames and strands that an adapter was trained with; empty if not recorded."""
    path = find_file(adapter_folder(adapter), READING, None)
    return read_json(path) if path else {}


def adapter_base_hash(adapter: str) -> str | None:
    """Hash of the weights of the model that an adapter was trained on; None where not recorded.

    Fine-tuning records it in its output folder, beside the folder `adapter`.
    """
    folder = Path(adapter_folder(adapter))
    path = folder.parent / TRAINED
    is_ours = folder.name == "adapter" and path.is_file()
    return read_json(path).get("base_hash") if is_ours else None


def resolve_base(model: str, revision: str | None, adapter: str | None) -> tuple[str, str | None]:
    """The model and the revision to load an adapter onto.

    If no model was named, it is the one that the adapter was trained on. If that is the model,
    its recorded commit is used unless another revision was requested.

    Raises:
        ModelError: the folder of the model that the adapter was trained on does not exist.
    """
    if not adapter:
        return model, revision
    base, commit = adapter_base(adapter)
    if model == DEFAULT_MODEL and base:
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise ModelError(
                f"adapter {adapter!r} was trained on the model {base}, which no longer exists; "
                "pass its folder as --model FOLDER"
            )
        model = base
    return model, revision or (commit if model == base and not Path(model).is_dir() else None)


def split_finetuned(model: str) -> tuple[str, str | None, str | None]:
    """Base model, its revision and adapter that a name stands for.

    The output folder of fine-tuning stands for all three; any other name for itself.
    """
    base, revision = adapter_base(model) if Path(model).is_dir() else (None, None)
    return (model, None, None) if base is None else (base, revision, model)


def resolve_commit(model: str, revision: str | None) -> str:
    """The commit that a hub model's files come from; empty for a folder."""
    if Path(locate(model)).is_dir():
        return ""
    path = cached_file(model, "config.json", revision=revision, local_files_only=is_offline())
    return extract_commit_hash(path, None) or revision or ""


def absolute(name: str) -> str:
    """A folder's full path; a model id unchanged."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def adapter_folder(adapter: str) -> str:
    """The folder of an adapter's files, also inside the output folder of fine-tuning."""
    adapter = locate(adapter)
    inside = Path(adapter) / "adapter"  # of the output folder of fine-tuning
    return str(inside) if inside.is_dir() else adapter
