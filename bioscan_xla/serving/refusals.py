"""What the server answers when it cannot do what was asked, in the shape of OpenAI's errors.

Input: what is wrong. Output: an exception that carries a status and a JSON body.
Invariants: no message quotes a key or a sequence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that is not served.

    Attributes:
        status: HTTP status.
        code: a word for programs.
        message: a sentence for people, with the remedy.
        param: the field that is wrong.
        retry_after_seconds: when to try again.
        sequences: the sequences that are wrong: index, code and reason of each.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        sequences: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after_seconds, self.sequences = retry_after_seconds, sequences

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error: dict[str, Any] = {
            "message": self.message,
            "type": _KINDS.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        if self.sequences:
            error["sequences"] = list(self.sequences)
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        headers = {}
        if self.retry_after_seconds is not None:
            headers["retry-after"] = str(self.retry_after_seconds)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def deadline_passed() -> Refused:
    """The refusal of a request that took too long."""
    return Refused(
        504,
        "deadline_exceeded",
        "the deadline passed before the answer was ready; send fewer sequences at once, or allow "
        "more time with the header x-timeout-seconds",
    )
