"""Where background jobs may read and write.

Input: files and URLs from a client. Output: the same, resolved. Invariants: what is returned lies
below an allowed folder or URL, after `..` and symbolic links are followed.
"""

import os
from collections.abc import Sequence

from ..reads.inputs import expand_inputs, is_remote
from .refusals import Refused


class Roots:
    """Folders and URLs below which jobs may read and write."""

    def __init__(self, roots: Sequence[str]):
        """Resolve the roots; a local one need not exist yet."""
        self.urls = tuple(root.rstrip("/") for root in roots if is_remote(root))
        self.folders = tuple(os.path.realpath(root) for root in roots if not is_remote(root))

    def find_inputs(self, given: str | Sequence[str]) -> list[str]:
        """Files that the names stand for: files, globs, folders, URLs.

        Raises:
            Refused: 403, one lies elsewhere.
            InputError: nothing of that name.
        """
        names = [given] if isinstance(given, str) else given
        found = expand_inputs([self.resolve(name, "input") for name in names])
        return [self.resolve(name, "input") for name in found]  # a link may lead out

    def find_output(self, given: str) -> str:
        """The folder or URL that an output stands for; a root itself is none.

        Raises:
            Refused: 403, it lies elsewhere.
        """
        resolved = self.resolve(given, "output")
        if resolved.rstrip("/") in (*self.urls, *self.folders):
            raise _outside("output", "name a folder below the allowed one")
        return resolved

    def resolve(self, name: str, param: str) -> str:
        """An absolute path or URL below a root."""
        name = name.removeprefix("file://")
        if "::" in name or "\0" in name:
            raise _outside(param, "chained URLs are not allowed")
        if is_remote(name):
            parts = name.split("://", 1)[1].split("/")
            if {"..", "."} & set(parts) or not any(_is_below(name, url, "/") for url in self.urls):
                raise _outside(param)
            return name
        if not os.path.isabs(name):
            raise _outside(param, "give the whole path, from / on")
        real = os.path.realpath(name)
        if not any(_is_below(real, folder, os.sep) for folder in self.folders):
            raise _outside(param)
        return real


def _is_below(name: str, root: str, separator: str) -> bool:
    return name.rstrip(separator) == root or name.startswith(root.rstrip(separator) + separator)


def _outside(param: str, hint: str = "the server allows others with --job-roots") -> Refused:
    return Refused(
        403,
        "not_allowed",
        f"{param}: not below a folder or URL that is allowed; {hint}",
        param=param,
    )
