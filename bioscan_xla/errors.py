"""The errors a user can cause; every message says what happened, where, and what to do."""


class BioscanError(Exception):
    """Base of all errors that a user of bioscan_xla can cause and fix."""


class InputError(BioscanError, ValueError):
    """An input file is missing, unreadable, truncated or lacks a column; names file and record."""


class ConfigError(BioscanError, ValueError):
    """An option is unknown, out of range or contradicts another."""


class ModelError(BioscanError, ValueError):
    """A model or adapter is not found, is of another family, or would need unsafe loading."""


class DeviceError(BioscanError, RuntimeError):
    """The requested device is not usable on this machine."""


class TableError(BioscanError, RuntimeError):
    """The LanceDB table cannot be opened, written, or belongs to another run."""


class SyncError(BioscanError, RuntimeError):
    """A copy cannot start, was interrupted, or differs from its source afterwards."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
