"""The reference table that is searched, as it is at each search.

Input: vectors. Output: the nearest rows. Invariants: rows that were added are found; a table that
was made anew is opened again; one that another model made is refused, never compared.
"""

import logging
from typing import Any

import numpy as np

from ..encode.fingerprint import compare
from ..errors import TableError, first_line
from ..table.neighbours import nearest_rows, open_table, read_fingerprint
from .refusals import Refused

log = logging.getLogger(__name__)

_ERRORS = (OSError, RuntimeError, ValueError)


class ReferenceTable:
    """An open table and its place; used from many threads."""

    def __init__(self, uri: str, name: str):
        """Open it; TableError if there is none."""
        self._uri, self._name = uri, name
        self._table = open_table(uri, name)
        self.made_by = read_fingerprint(self._table)

    @property
    def columns(self) -> list[str]:
        """Names of its columns."""
        return list(self._table.schema.names)

    def nearest(self, vectors: np.ndarray, k: int, where: str | None) -> list[list[dict[str, Any]]]:
        """The nearest rows of each vector.

        Raises:
            Refused: the condition is wrong, the table cannot be read, or another model made it.
        """
        try:
            self._table.checkout_latest()
            return self._search(vectors, k, where)
        except (TableError, *_ERRORS):  # its files may have been replaced
            pass
        try:
            self._table = open_table(self._uri, self._name)
        except (TableError, *_ERRORS) as error:
            raise _unreadable(error) from error
        try:
            return self._search(vectors, k, where)
        except (TableError, *_ERRORS) as error:
            if where is None:
                raise _unreadable(error) from error
            raise Refused(400, "search_failed", str(error), param="where") from error

    def _search(self, vectors: np.ndarray, k: int, where: str | None) -> list[list[dict[str, Any]]]:
        table = self._table
        if compare(self.made_by, read_fingerprint(table)).different:
            raise Refused(
                409,
                "table_replaced",
                "the reference table was made anew by another model; load that one: "
                "POST /v1/models, or start the server again",
            )
        return nearest_rows(table, vectors, k, where)


def _unreadable(error: Exception) -> Refused:
    log.error("the reference table cannot be read: %s", first_line(error))
    return Refused(500, "table_error", "the reference table cannot be read")
