"""Where the files inside a tar archive lie, read from its headers; nothing is ever unpacked.

Archives are untrusted: only regular files and directories are taken, with relative names, inside the archive's own
bytes. The formats are ustar, GNU and pax, as Python's tarfile, GNU tar and libarchive write them. (Reading them with
tarfile takes three times as long, and ends in silence at a damaged header.)

Source: POSIX.1-2017, pax; https://www.gnu.org/software/tar/manual/html_node/Standard.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from bmctl.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTRA_BYTES = 1 << 20
_MAX_NAME = 4096
_EXTRA = (b"L", b"K", b"x", b"g")
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a sparse file",
    b"M": "the continuation of a file in another volume",
    b"D": "an incremental dump",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file: its name in the archive, and where its bytes are."""

    name: str
    offset: int
    size_bytes: int


def read_members(descriptor: int, *, archive: str, size_bytes: int) -> Iterator[Member]:
    """The regular files of an archive, in order.

    Args:
        descriptor: Of the open archive, read by position.
        archive: Its name, for messages.
        size_bytes: Its size.

    Raises:
        DataError: Not a tar archive, truncated, damaged, or with members that are no regular files.
    """
    offset, extra = 0, _Extra()
    while True:
        header = os.pread(descriptor, BLOCK, offset)
        if header == _ZEROS:
            _check_end(descriptor, offset, archive=archive)
            return
        _check_header(header, archive=archive, offset=offset)
        kind = header[156:157]
        raw_name = extra.name if extra.name is not None else _name(header)
        name = _checked_name(raw_name, archive=archive)
        where = f"{archive}: member {name!r}"
        size = _number(header[124:136], where=where)
        if extra.size_bytes is not None and kind not in _EXTRA:
            size = extra.size_bytes
        start = offset + BLOCK
        if size < 0 or start + size > size_bytes:
            raise DataError(
                f"{where}: {size:,} bytes are promised and {max(0, size_bytes - start):,} are there",
                hint="the archive is truncated or damaged: fetch it again",
            )
        offset = start + -(-size // BLOCK) * BLOCK
        if kind in _EXTRA:
            if size > _MAX_EXTRA_BYTES:
                raise DataError(f"{where}: a header of {size:,} bytes", hint="write the archive with GNU tar or Python")
            extra = extra.read(kind, os.pread(descriptor, size, start), where=where)
            continue
        if kind in _REFUSED or extra.sparse:
            raise DataError(
                f"{where}: {_REFUSED.get(kind, 'a sparse file')}, expected a regular file",
                hint="write the archive without it (GNU tar: --dereference --hard-dereference, without --sparse)",
            )
        if kind not in (b"0", b"\0", b"7", b"5", b"V"):
            raise DataError(f"{where}: of the unknown type {kind!r}", hint="write the archive with GNU tar or Python")
        extra = _Extra()
        if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
            yield Member(name.removeprefix("./"), start, size)


@dataclass(frozen=True)
class _Extra:
    """What headers of GNU tar and pax say about the member after them."""

    name: bytes | None = None
    size_bytes: int | None = None
    sparse: bool = False

    def read(self, kind: bytes, body: bytes, *, where: str) -> _Extra:
        if kind == b"L":
            return _Extra(body.rstrip(b"\0"), self.size_bytes, self.sparse)
        if kind == b"K":  # a long link's target: the link that follows is refused
            return self
        records = dict(_records(body, where=where))
        sparse = self.sparse or any(key.startswith(b"GNU.sparse") for key in records)
        if kind == b"g":
            if sparse or records.keys() & {b"path", b"size"}:
                raise DataError(f"{where}: a global header with names or sizes", hint="write the archive with GNU tar")
            return self
        size = records.get(b"size")
        if size is not None and not (size.isdigit() and len(size) < 19):
            raise DataError(f"{where}: the size {size!r}", hint="the archive is damaged: fetch it again")
        return _Extra(records.get(b"path", self.name), int(size) if size is not None else self.size_bytes, sparse)


def _records(body: bytes, *, where: str) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a pax header: ``LENGTH KEY=VALUE\\n``, where LENGTH counts the whole record."""
    while body:
        length, space, _ = body[:20].partition(b" ")
        end = int(length) if length.isdigit() else 0
        record = body[len(length) + 1 : end - 1]
        key, equals, value = record.partition(b"=")
        if not (space and equals) or end > len(body) or body[end - 1 : end] != b"\n":
            raise DataError(f"{where}: a pax header that is not one", hint="the archive is damaged: fetch it again")
        yield key, value
        body = body[end:]


def _check_header(header: bytes, *, archive: str, offset: int) -> None:
    if len(header) < BLOCK:
        what = "empty" if offset == 0 and not header else f"without an end mark at byte {offset:,}"
        raise DataError(f"{archive}: truncated: {what}", hint="fetch it again, or write it again")
    try:
        expected = int(header[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        expected = -1
    if expected != sum(header) - sum(header[148:156]) + 8 * 32:
        if offset == 0:
            packed = header[:2] == b"\x1f\x8b" or header[:4] in (b"\x28\xb5\x2f\xfd", b"BZh9", b"\xfd7zX")
            hint = "unpack the compression first: gunzip" if packed else "fetch it again"
            raise DataError(f"{archive}: {'a compressed file' if packed else 'not a tar archive'}", hint=hint)
        raise DataError(f"{archive}: damaged at byte {offset:,}", hint="fetch it again")


def _check_end(descriptor: int, offset: int, *, archive: str) -> None:
    """After the end mark there is nothing but padding."""
    while block := os.pread(descriptor, 1 << 20, offset):
        if block.count(0) != len(block):
            raise DataError(
                f"{archive}: goes on after its end mark at byte {offset:,}",
                hint="archives cannot be joined by cat: tar --concatenate, or keep them as shards",
            )
        offset += len(block)


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _checked_name(name: bytes, *, archive: str) -> str:
    text = name.decode("utf-8", "backslashreplace")
    if not text or len(name) > _MAX_NAME or "\0" in text:
        raise DataError(f"{archive}: member {text[:80]!r}: not a name", hint="write the archive again")
    if text.startswith("/") or ".." in text.split("/"):
        raise DataError(
            f"{archive}: member {text!r}: a name that leads out of the archive", hint="write it with relative names"
        )
    return text


def _number(field: bytes, *, where: str) -> int:
    """Octal digits, or GNU's binary form for sizes from 8 GiB."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise DataError(f"{where}: the size {field!r}", hint="the archive is damaged: fetch it again") from None
