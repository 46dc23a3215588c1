"""The models that are served, by name and by fingerprint.

Input: loaded models. Output: the one that a request means.
Invariants: a request keeps the version it began with; the current version of a name changes in one
step; an older one stays until it is dropped.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..encode.encoder import Encoder
from ..errors import ModelError
from .device import SharedEncoder
from .refusals import Refused

if TYPE_CHECKING:
    from ..classification.opening import Opened
    from .reference_table import ReferenceTable


@dataclass(frozen=True, eq=False)
class Version:
    """A loaded model with what belongs to it.

    Attributes:
        name: what clients call it.
        id: the name and the fingerprint, `name@0123456789ab`.
        created: when it was loaded, in seconds since 1970.
        encoder: for the thread that owns the device.
        shared: the same for all other threads.
        naming: for /v1/classify, or why there is none.
        table: for /v1/search, or why there is none.
    """

    name: str
    id: str
    created: int
    encoder: Encoder
    shared: SharedEncoder
    naming: "Opened | str"
    table: "ReferenceTable | str"


class Versions:
    """All versions; used from many threads."""

    def __init__(self, limit: int):
        """Start empty; `limit` is the most versions held at once."""
        self.limit = limit
        self.default: str | None = None
        self._by_id: dict[str, Version] = {}
        self._current: dict[str, str] = {}
        self._lock = threading.Lock()

    def check_room(self) -> None:
        """Refuse a further version when there are as many as allowed."""
        if len(self._by_id) >= self.limit:
            raise ModelError(
                f"{len(self._by_id)} versions are held, as many as max_models allows; drop one "
                "first: DELETE /v1/models/ID"
            )

    def install(self, version: Version) -> None:
        """Make a version the current one of its name."""
        with self._lock:
            if version.id not in self._by_id:
                self.check_room()
            # The same weights may come with another reference: the newer one replaces it.
            self._by_id[version.id] = version
            self._current[version.name] = version.id
            self.default = self.default or version.name

    def find(self, model: str | None) -> Version:
        """The version that a request means: by name the current one, by id exactly that one.

        Raises:
            Refused: 404, there is none.
        """
        with self._lock:
            name = model or self.default or ""
            version = self._by_id.get(self._current.get(name, name))
        if version is None:
            held = ", ".join(item.id for item in self.all())
            raise Refused(
                404,
                "model_not_found",
                f"there is no model {name[:200]!r}; served are {held}",
                param="model",
            )
        return version

    def current(self, name: str) -> Version | None:
        """The version that a name means; None if it means none."""
        with self._lock:
            return self._by_id.get(self._current.get(name, ""))

    def is_current(self, version: Version) -> bool:
        """True if the name of the version means it."""
        return self._current.get(version.name) == version.id

    def all(self) -> Sequence[Version]:
        """All versions, the oldest first."""
        return list(self._by_id.values())

    def drop(self, model: str) -> Version:
        """Forget a version; requests that have begun with it are finished.

        The current version of a name takes the name with it.

        Raises:
            Refused: 404, there is none; 409, it is the default, or current and not given by its id.
        """
        version = self.find(model)
        with self._lock:
            if self.is_current(version):
                if version.name == self.default:
                    raise Refused(
                        409,
                        "model_in_use",
                        f"{version.id} is what requests that name no model get; load another as "
                        f"{version.name!r} first",
                    )
                if version.id != model:
                    raise Refused(
                        409,
                        "model_in_use",
                        f"{version.id} is the current version of {version.name!r}; to take the "
                        "name away too, give the whole id",
                    )
                del self._current[version.name]
            self._by_id.pop(version.id, None)
        return version
