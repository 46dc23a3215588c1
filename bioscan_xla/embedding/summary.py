"""The summary of a run and its exit status.

Input: the options and the figures of a run. Output: text, and a number for the shell.
Invariants: status 0 means that every usable record of the input, or of this process's share, is in
the table, or that --max-sequences was reached.
"""

from typing import Any

from ..options import EmbedConfig
from ..reads.cleaning import Code
from ..reads.shares import BLOCK_ROWS

NOTHING_USABLE = 2


def exit_status(config: EmbedConfig, result: dict[str, Any]) -> int:
    """128 + signal if interrupted, 1 after a read error, 2 if nothing is usable, else 0."""
    if result["interrupted"]:
        return 128 + result["interrupted"]
    if result["failure"] is not None:
        return 1
    return NOTHING_USABLE if _is_nothing_usable(config, result) else 0


def summarise(config: EmbedConfig, result: dict[str, Any]) -> str:
    """The summary printed at the end."""
    rejected = ", ".join(
        f"{Code(code).words} ({count:,})" for code, count in result["rejected"].items()
    )
    lines = []
    if _is_nothing_usable(config, result):
        lines.append(_why_nothing_is_usable(config, result, rejected))
    elif not result["sequences_processed"] and result["failure"] is not None:
        return f"nothing embedded: table {config.table!r} of {config.db} is as it was"
    elif not result["sequences_processed"] and not result["interrupted"]:
        share = _share(config)
        lines.append(
            f"nothing to do: every record of {share} is in table {config.table!r} of "
            f"{config.db} ({result['total_rows']:,} rows) or was rejected"
        )
        return "\n".join(lines)
    else:
        lines += [
            f"{_how_many(config, result)} embedded in {result['seconds']:.1f} s: "
            f"{result['sequences_per_second']:.1f} sequences/s",
            f"table {config.table!r} in {config.db}: {result['total_rows']:,} rows, vectors of "
            f"{result['avg_vector_length']} numbers, mean norm {result['sample_vector_norm']:.2f}",
        ]
    if cosine := result["fingerprint"].get("int8_cosine"):
        lines.append(f"int8: the least cosine to float32 is {cosine}, on the first sequences")
    changes = ", ".join(
        f"{rule.replace('_', ' ')} {count:,}" for rule, count in result["cleaned"].items() if count
    )
    if changes:
        lines.append(f"cleaned: {changes}")
    if result["windowed"]:
        lines.append(f"{result['windowed']:,} sequences were longer than one window of the model")
    if result["errors"]:
        lines.append(f"{result['errors']:,} records rejected (see {_list(config)}): {rejected}")
    if result["interrupted"]:
        lines.append("interrupted; everything above is committed. Run the same command to resume")
    elif result["total_rows"]:
        table = "" if config.table == "embeddings" else f" --table {config.table}"
        lines.append(f"next: python -m bioscan_xla.search --db {config.db}{table} FILE.fasta -k 5")
    return "\n".join(lines)


def _is_nothing_usable(config: EmbedConfig, result: dict[str, Any]) -> bool:
    """True if no record of the input, or none that this process read, is usable."""
    if result["usable"] or result["interrupted"] or result["failure"] is not None:
        return False
    return bool(result["sequences_processed"]) or config.process_count == 1


def _why_nothing_is_usable(config: EmbedConfig, result: dict[str, Any], rejected: str) -> str:
    if not result["sequences_processed"] and not result["already_done"]:
        return "no usable sequence: the input has no records; is it the right file?"
    if not result["sequences_processed"]:
        return (
            "no usable sequence: every record of the input was rejected by an earlier run; see "
            f"{_list(config)}"
        )
    return (
        f"no usable sequence: all {result['errors']:,} records of {_share(config)} were rejected "
        f"({rejected}). Is this DNA or RNA, and is the right column named (--columns)?"
    )


def _how_many(config: EmbedConfig, result: dict[str, Any]) -> str:
    number = result["embeddings_generated"]
    is_all = not result["interrupted"] and result["failure"] is None
    if not is_all or number == config.max_sequences:
        return f"{number:,} sequences"
    share = "" if config.process_count == 1 else " of this process's share"
    if result["already_done"]:
        return f"the remaining {number:,} usable sequences{share} were"
    return f"all {number:,} usable sequences{share}"


def _share(config: EmbedConfig) -> str:
    if config.process_count == 1:
        return "the input"
    return f"this process's share (blocks of {BLOCK_ROWS:,} records) of the input"


def _list(config: EmbedConfig) -> str:
    stem = "rejected" if config.table == "embeddings" else f"rejected-{config.table}"
    return f"{stem}{f'-{config.process_index}' if config.process_index else ''}.parquet"
