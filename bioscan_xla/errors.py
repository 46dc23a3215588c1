"""The few errors a user can cause; every message says what happened, where, and the remedy."""


class BioscanError(Exception):
    """Base of all errors that a user of bioscan_xla can cause and mend."""


class InputError(BioscanError, ValueError):
    """An input file is missing, unreadable, truncated or lacks a column; names file and record."""


class ConfigError(BioscanError, ValueError):
    """An option is unknown, out of range or contradicts another."""


class ModelError(BioscanError, ValueError):
    """A model or adapter cannot be found, is of another family, or would need unsafe loading."""


class DeviceError(BioscanError, RuntimeError):
    """The device that was asked for is not usable on this machine."""


class TableError(BioscanError, RuntimeError):
    """The LanceDB table cannot be opened, written, or belongs to another run."""


class SyncError(BioscanError, RuntimeError):
    """A copy between two places cannot begin, broke off, or is not the same afterwards."""


def first_line(error: BaseException) -> str:
    """What an error says, without the lines behind the first."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
