"""Files to lines of text: local or remote, plain or gzip, detected by content, not by name.

Input: the name or address of a text file.
Output: `Text`: its format, and its lines one by one.
Invariants: memory does not grow with the file; everything before the damage is given before the
`Broken` that names it; a file that is not sequence text is reported as what it is.
"""

import io
import itertools
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import first_line
from .inputs import filesystem_of, format_of, is_remote
from .raw import Broken

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 18
_MOST_INFLATED_BYTES = 1 << 20  # at a time: a long run of one letter compresses a thousandfold
_HEAD_BYTES = 512
_GZIP = b"\x1f\x8b"
_GZIP_DEFLATE = b"\x1f\x8b\x08"
_UTF8_MARK = b"\xef\xbb\xbf"
_COPY_AGAIN = "copy the file again"

_UNPACK = "decompress it, or compress it with gzip"
_OTHER_KINDS = (
    (b"PAR1", "is a Parquet file", "rename it to end in .parquet"),
    (_GZIP, "is compressed with gzip twice", "decompress it once"),
    (b"BZh", "is compressed with bzip2", _UNPACK),
    (b"\xfd7zXZ", "is compressed with xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", _UNPACK),
    (b"PK\x03\x04", "is a zip archive", _UNPACK),
    (b"BAM\x01", "is a BAM file", "convert it with `samtools fasta`"),
    (b"LOCUS ", "is a GenBank file", "convert it to FASTA"),
    (b"<", "is a web page or XML, perhaps an error page", "download the file again"),
)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Text:
    """An open text file.

    Attributes:
        kind: `fasta` or `fastq`.
        lines: without line ends, each byte a character (Latin-1); see `decode`.
    """

    kind: str
    lines: Iterator[str]


def open_text(source: str) -> Text:
    """Open a FASTA or FASTQ file and detect which of the two it is.

    The file is closed when its lines have been read or are discarded.

    Raises:
        Broken: it cannot be opened, or is something else. The lines raise it where it is damaged.
    """
    head, blocks = _open_blocks(source)
    kind = _kind_of(head)
    if kind and kind != format_of(source):
        log.warning("%s: contains %s despite its name, and is read as that", source, kind.upper())
    return Text(kind or format_of(source), _split_lines(itertools.chain([head], blocks)))


def read_lines(source: str) -> Iterator[str]:
    """The lines of any text file, each byte a character (Latin-1); see `decode`.

    Raises:
        Broken: it cannot be read, or not in full, or is not text.
    """
    head, blocks = _open_blocks(source)
    yield from _split_lines(itertools.chain([head], blocks))


def _open_blocks(source: str) -> tuple[bytes, Iterator[bytes]]:
    """The start of a text file, decompressed and without a byte-order mark, and the rest of it."""
    head, blocks = _peek(_unpack(source, _read_blocks(source)))
    if head.startswith(_UTF8_MARK):
        head = head[len(_UTF8_MARK) :]
    _refuse_other_kinds(head)
    return head, blocks


def decode(text: str) -> str:
    """A piece of a line as text: UTF-8, or Latin-1 where it is not UTF-8."""
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return text


def read_head(source: str) -> bytes:
    """The first bytes of a file, to detect what it is; empty if it cannot be read."""
    try:
        return next(_read_blocks(source), b"")[:_HEAD_BYTES]
    except Broken:
        return b""


def _read_blocks(source: str) -> Iterator[bytes]:
    try:
        with _open_bytes(source) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except Broken:
        raise
    except Exception as error:  # every storage backend raises its own errors
        if not is_remote(source) and not isinstance(error, OSError):
            raise
        remedy = (
            "check the address, the network and the credentials, then run again to resume"
            if is_remote(source)
            else "check the path, its permissions and the disk"
        )
        raise Broken(f"cannot be read ({first_line(error)})", remedy) from error


def _open_bytes(source: str) -> BinaryIO:
    if is_remote(source):
        filesystem, path = filesystem_of(source)
        return filesystem.open(path, "rb")
    return open(source, "rb", buffering=0)


def _peek(blocks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first few hundred bytes or more, and the blocks after them."""
    head = b""
    try:
        while len(head) < _HEAD_BYTES:
            head += next(blocks)
    except StopIteration:
        pass
    except Broken as broken:
        if not head:
            raise
        return head, _raise(broken)
    return head, blocks


def _raise(broken: "Broken") -> Iterator[bytes]:
    raise broken
    yield b""


def _unpack(source: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Plain bytes, whether the file is compressed with gzip or not."""
    first = next(blocks, b"")
    named = source.lower().endswith(".gz")
    is_gzip = first.startswith(_GZIP)
    blocks = itertools.chain([first], blocks)
    if is_gzip and not named:
        log.warning("%s: compressed with gzip despite its name; read as gzip", source)
    if named and first and not is_gzip:
        log.warning("%s: not compressed with gzip despite its name; read as plain text", source)
    return _inflate(source, blocks) if is_gzip else blocks


def _inflate(source: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress gzip members, one after the other.

    The standard library's gzip module discards the whole block in which it finds damage.
    """
    member = None  # the one being decompressed
    rest = b""
    for block in blocks:
        rest += block
        is_full = False
        while rest or is_full:
            if member is None:
                if len(rest) < len(_GZIP):
                    break
                if not rest.startswith(_GZIP):
                    return _judge_trailing(source, itertools.chain([rest], blocks))
                member = zlib.decompressobj(wbits=31)
            before = member.copy()
            try:
                data = member.decompress(rest, _MOST_INFLATED_BYTES)
            except zlib.error as error:
                yield _inflate_to_damage(before, rest)
                raise _damaged(error) from error
            yield data
            is_full = len(data) == _MOST_INFLATED_BYTES and not member.eof
            rest = member.unused_data if member.eof else member.unconsumed_tail
            if member.eof:
                member = None
    if member is not None:
        raise Broken("is truncated", f"its gzip data end too early: {_COPY_AGAIN}")
    if rest:
        _judge_trailing(source, iter([rest]))


def _inflate_to_damage(member, data: bytes) -> bytes:
    """Everything that can be decompressed before the damage, to the last byte."""
    parts = []
    try:
        for place in range(len(data)):
            piece = data[place : place + 1]
            while byte := member.decompress(piece, 1):
                parts.append(byte)
                piece = member.unconsumed_tail
    except zlib.error:
        pass
    return b"".join(parts)


def _damaged(error: zlib.error) -> Broken:
    if "data check" in str(error) or "length check" in str(error):  # after the data
        return Broken(
            "does not match its gzip checksum",
            f"some of its records may be wrong: {_COPY_AGAIN}, and read it into a new table",
        )
    return Broken("is damaged", f"its gzip data are corrupt from there on: {_COPY_AGAIN}")


def _judge_trailing(source: str, blocks: Iterator[bytes]) -> None:
    """Skip bytes after the last gzip member, unless another member is among them."""
    count, end = 0, b""
    for block in blocks:
        count += len(block)
        if _GZIP_DEFLATE in end + block:
            raise Broken("is damaged", f"it has gzip data after other bytes: {_COPY_AGAIN}")
        end = block[-2:]
    log.warning("%s: %d bytes after its gzip data were skipped", source, count)


def _refuse_other_kinds(head: bytes) -> None:
    for start, what, remedy in _OTHER_KINDS:
        if head.lstrip().startswith(start):
            raise Broken(what, remedy)
    start = head[:_HEAD_BYTES]
    if head.startswith(_UTF16) or (b"\0" in start and not (any(start[::2]) and any(start[1::2]))):
        raise Broken("is UTF-16 text", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if b"\0" in start:
        raise Broken("is binary", "pass FASTA, FASTQ or Parquet")


def _kind_of(head: bytes) -> str | None:
    """`fasta` or `fastq`, by the first line that is neither blank nor a comment."""
    for line in head.splitlines():
        line = line.strip()
        if line and not line.startswith((b";", b"#")):
            return {b">": "fasta", b"@": "fastq"}.get(line[:1])
    return None


def _split_lines(blocks: Iterator[bytes]) -> Iterator[str]:
    """Lines ending in a line feed, a carriage return or both, without their line ends."""
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    parts: list[str] = []
    for block in blocks:
        pieces = ends.decode(block.decode("latin-1")).split("\n")
        parts.append(pieces[0])
        if len(pieces) > 1:
            yield "".join(parts)
            yield from pieces[1:-1]
            parts = [pieces[-1]]
    parts.append(ends.decode("", final=True).rstrip("\n"))
    if last := "".join(parts):
        yield last
