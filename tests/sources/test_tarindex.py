"""Headers of tar archives: as Python's tarfile reads them, and refused where they are not plain files."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bmctl.errors import DataError
from bmctl.sources.tarindex import Member, read_members

from .conftest import write_tar


def index(path: Path) -> list[Member]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(read_members(descriptor, archive=str(path), size_bytes=path.stat().st_size))
    finally:
        os.close(descriptor)


def by_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as archive:
        return [Member(each.name.removeprefix("./"), each.offset_data, each.size) for each in archive if each.isfile()]


NAMES = ["a.jpg", "folder/b.cls", "n" * 99, "n" * 100, "long/" * 30 + "c.png", "ü" * 60 + ".jpg", "d" * 140 + "/e.txt"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_and_sizes_around_a_block(tmp_path: Path, format: int) -> None:
    rng = np.random.default_rng(0)
    sizes = [0, 1, 511, 512, 513, 1024, 3000]
    members = [(name, rng.bytes(size)) for name, size in zip(NAMES, sizes, strict=True)]
    path = write_tar(tmp_path / "x.tar", members, format=format)
    found = index(path)
    assert found == by_tarfile(path)
    assert [member.name for member in found] == NAMES
    content = path.read_bytes()
    assert [content[each.offset : each.offset + each.size_bytes] for each in found] == [body for _, body in members]


def test_ustar_joins_its_prefix(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("folder/" * 20 + "a.png", b"1")])
    assert [member.name for member in index(path)] == ["folder/" * 20 + "a.png"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("format", ["gnu", "posix", "ustar", "v7", "oldgnu"])
def test_what_gnu_tar_writes(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "z" * 90):
        (folder / name).write_bytes(name.encode() * 100)
    path = tmp_path / "x.tar"
    subprocess.run(["tar", f"--format={format}", "-cf", str(path), "-C", str(folder), "."], check=True)
    assert index(path) == by_tarfile(path)
    assert {member.name for member in index(path)} == {"a.jpg", "sub/b.jpg", "z" * 90}


def special(kind: bytes, name: str = "x.jpg", **fields: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(name)
            info.type = kind
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info)

    return write


def bytes_of(make: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    """Damages an archive of two members."""

    def write(path: Path) -> None:
        write_tar(path, [("a.jpg", b"x" * 700), ("a.cls", b"1")])
        path.write_bytes(make(bytearray(path.read_bytes())))

    return write


def edited(raw: bytearray, at: int, value: bytes, *, header: int = 0) -> bytearray:
    """With `value` in a header whose checksum is made right again."""
    raw[header + at : header + at + len(value)] = value
    block = raw[header : header + 512]
    block[148:156] = b" " * 8
    raw[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    return raw


def with_pax(**headers: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("a.jpg")
            info.pax_headers = {key.replace("__", "."): value for key, value in headers.items()}
            archive.addfile(info)

    return write


def with_global(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "other"}) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b"") and None, "truncated: empty"),
    "no tar": (lambda path: path.write_bytes(b"x" * 2000) and None, "not a tar archive"),
    "gzipped": (lambda path: path.write_bytes(b"\x1f\x8b" + b"x" * 2000) and None, "a compressed file"),
    "link": (special(tarfile.SYMTYPE, linkname="/etc/passwd"), "member 'x.jpg': a symbolic link, expected a regular"),
    "hard link": (special(tarfile.LNKTYPE, linkname="a"), "a hard link"),
    "fifo": (special(tarfile.FIFOTYPE), "a FIFO"),
    "device": (special(tarfile.CHRTYPE), "a device"),
    "sparse": (special(tarfile.GNUTYPE_SPARSE), "a sparse file"),
    "unknown": (special(b"Z"), "of the unknown type b'Z'"),
    "climbing": (special(tarfile.REGTYPE, name="a/../../x.jpg"), "a name that leads out of the archive"),
    "absolute": (special(tarfile.REGTYPE, name="/etc/x.jpg"), "a name that leads out of the archive"),
    "sparse in pax": (with_pax(GNU__sparse__major="1"), "a sparse file"),
    "size in pax": (with_pax(size="99999"), "99,999 bytes are promised"),
    "size that is none": (with_pax(size="-4"), "the size b'-4'"),
    "climbing in pax": (with_pax(path="../x.jpg"), "'../x.jpg': a name that leads out"),
    "global path": (with_global, "a global header with names or sizes"),
    "cut in a body": (bytes_of(lambda raw: raw[:900]), r"member 'a\.jpg': 700 bytes are promised and 388 are there"),
    "cut in a header": (bytes_of(lambda raw: raw[:1600]), "truncated: without an end mark at byte 1,536"),
    "cut at a border": (bytes_of(lambda raw: raw[:1536]), "truncated: without an end mark"),
    "joined": (bytes_of(lambda raw: raw + raw), "goes on after its end mark"),
    "one bit": (bytes_of(lambda raw: raw[:1540] + b"\x7f" + raw[1541:]), "damaged at byte 1,536"),
    "huge": (bytes_of(lambda raw: edited(raw, 124, b"77777777777\0")), "8,589,934,591 bytes are promised"),
    "huge in binary": (bytes_of(lambda raw: edited(raw, 124, b"\x80" + b"\xff" * 11)), "bytes are promised"),
    "size of letters": (bytes_of(lambda raw: edited(raw, 124, b"hello\0")), "the size b'hello"),
    "negative": (bytes_of(lambda raw: edited(raw, 124, b"-0000000001\0")), "-1 bytes are promised"),
    "no name": (bytes_of(lambda raw: edited(raw, 0, bytes(100))), "not a name"),
    "a long name of 1 GB": (
        bytes_of(lambda raw: edited(edited(raw, 156, b"L"), 124, b"00000001274\0")[:1700]),
        "promised|not a|damaged|truncated|leads",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_plain_archive_is_refused(tmp_path: Path, kind: str) -> None:
    make, said = BAD[kind]
    path = tmp_path / "x.tar"
    make(path)
    with pytest.raises(DataError, match=said) as caught:
        index(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """300 random edits, each either found or without effect on where members end."""
    rng = np.random.default_rng(0)
    path = write_tar(tmp_path / "x.tar", [("a" * 120, b"x" * 700), ("b.cls", b"1")], format=tarfile.PAX_FORMAT)
    original = path.read_bytes()
    for _ in range(300):
        raw = bytearray(original)
        for at in rng.integers(0, len(raw), 3):
            raw[at] = rng.integers(0, 256)
        path.write_bytes(raw)
        try:
            found = index(path)
        except DataError:
            continue
        assert all(0 <= member.offset <= member.offset + member.size_bytes <= len(raw) for member in found)
