"""Conditions of a search that come from a client.

Input: SQL text. Output: nothing, or a refusal. Invariants: what passes consists of columns of the
table, literals, comparisons and AND, OR, NOT; it calls no function and reads no other table, so all
it can do is filter.
"""

import re
from collections.abc import Collection

from .refusals import Refused

_WORDS = frozenset(
    ("and", "or", "not", "in", "between", "like", "is", "null", "true", "false"),
) | {"date", "timestamp"}
_BEFORE_PARENTHESIS = frozenset(("and", "or", "not", "in", "(", ""))
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<text>'(?:[^'\\]|'')*')
    | (?P<number>-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?(?![\w.]))
    | (?P<word>[A-Za-z_]\w*)
    | `(?P<column>[^`\\]+)`
    | (?P<sign><>|!=|<=|>=|[=<>(),])
    )""",
    re.VERBOSE | re.ASCII,
)
_MOST_TOKENS = 200
_HIDDEN = ("vector", "dna_sequence")


def check_condition(where: str, columns: Collection[str]) -> None:
    """Refuse what is more than a filter.

    Args:
        where: as the client sent it.
        columns: of the table.

    Raises:
        Refused: 400; the message names the first word that is not allowed.
    """
    known = {name.lower() for name in columns if name not in _HIDDEN}
    at, before, number = 0, "", 0
    where = where.rstrip()
    while at < len(where):
        found = _TOKEN.match(where, at)
        number += 1
        if found is None:
            word = where[at:].split()[0][:20]
            hint = "; quote a column with `backticks`" if word.startswith('"') else ""
            raise _refuse(f"{word!r} is not allowed{hint}")
        if number > _MOST_TOKENS:
            raise _refuse(f"it has more than {_MOST_TOKENS} words")
        word = (found["word"] or found["column"] or "").lower()
        if word and (found["column"] or word not in _WORDS) and word not in known:
            raise _refuse(
                f"{word[:40]!r} is no column; columns are {', '.join(sorted(known))}; functions "
                "are not allowed"
            )
        if found["sign"] == "(" and before not in _BEFORE_PARENTHESIS:
            raise _refuse(f"{before[:40]!r} before a parenthesis is not allowed")
        before = word or found["sign"] or found["text"] or found["number"]
        at = found.end()
    if not number:
        raise _refuse("it is empty")


def _refuse(what: str) -> Refused:
    return Refused(
        400,
        "bad_condition",
        f"where: {what}. A condition is made of columns, numbers, 'text', = != < <= > >=, IN, "
        "BETWEEN, LIKE, IS NULL, AND, OR, NOT and parentheses",
        param="where",
    )
