"""WebDataset: tar files of samples, each an image and its label under one name, ``0001.jpg`` and ``0001.cls``.

The archives are never unpacked: their headers are read once, and images where they lie. Val and test have files of
their own, or are carved from the training samples by ratio, chosen by a hash of file and name. Other members of a
sample are passed over, and so are names that begin with a dot or with two underscores.

Source: https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from bmctl.core.columns import Column
from bmctl.errors import DataError
from bmctl.schema import Count, Many, Strict
from bmctl.sources.classes import Label, name_labels
from bmctl.sources.samples import Indices, labelled, pick, pictures_of
from bmctl.sources.shards import SPLITS, Stamp, find, open_unchanged, stamp
from bmctl.sources.tarindex import Member, read_members

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
MAX_LABEL_BYTES = 1 << 20
_END_BYTES = 4096
INPUT = "image"


class Config(Strict):
    """Attributes:
    shards: Training files: a folder, ``train-*.tar`` or ``train-{000000..000146}.tar``; relative to where bmctl is
        started.
    val_shards: Validation files; without, `val` is carved from the training samples. Likewise test_shards.
    val: Share that validates, where there are no val_shards.
    test: Share that tests, where there are no test_shards.
    seed: Of that choice.
    label: Where it stands: ``cls``, a number; ``txt``, a class name; ``json``, either, under `label_key`.
    class_names: In the order of the numbers; without, the numbers, or the names that occur, sorted.
    order: `full` shuffles all samples; `shards` reads files one after another, as discs and networks like it.
    window: With `shards`: samples among which is shuffled.
    """

    kind: Literal["webdataset"] = "webdataset"
    shards: str
    val_shards: str | None = None
    test_shards: str | None = None
    val: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    label: Literal["cls", "txt", "json"] = "cls"
    label_key: str = "label"
    class_names: Many[str] | None = None
    order: Literal["full", "shards"] = "full"
    window: Count = 4096


@dataclass(frozen=True)
class TarSamples:
    """Images inside tar files, decoded when they are read.

    Attributes:
        columns: `picture` and `label`.
        files: The archives.
        stamps: Of each, when it was indexed.
        parts: int32 [N], which archive.
        offsets: int64 [N], bytes from its beginning.
        sizes: int64 [N], bytes.
        labels: int64 [N].
        digests: uint64 [N], of size, beginning and end: equal for equal images.
        keys: The samples' names, each ended by a NUL.
        window: None for an order of all samples, else of samples from neighbouring places; see Config.
        fingerprint: SHA-256 over name, label and digest of every sample, and the order asked for: whole contents would
            take too long.
    """

    columns: Mapping[str, Column]
    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]
    parts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    keys: tuple[str, ...]
    window: int | None
    fingerprint: str
    in_memory: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    opens_files: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Where a sample stands, for messages."""
        return f"{self.files[self.parts[index]]}: member {self.keys[index]!r}"

    def read(self, indices: Indices, *, only: Collection[str] | None = None) -> dict[str, Sequence[Any]]:
        """Pictures as Pillow holds them, of mode L or RGB."""
        return labelled(lambda: self._pictures(indices), self.labels, indices, only=only)

    def read_each(self, batches: Sequence[Indices]) -> Iterator[dict[str, Sequence[Any]]]:
        return map(self.read, batches)

    def sketches(self) -> np.ndarray:
        return self.digests

    def identities(self, indices: Indices) -> list[bytes]:
        return [int(self.digests[index]).to_bytes(8) for index in indices]

    def _pictures(self, indices: Indices) -> list[Image.Image]:
        from bmctl.core.images import read

        descriptors: dict[int, int] = {}
        try:
            found = []
            for index in indices:
                part = int(self.parts[index])
                if part not in descriptors:
                    descriptors[part] = open_unchanged(self.files[part], self.stamps[part])
                size, offset = int(self.sizes[index]), int(self.offsets[index])
                found.append(read(BytesIO(os.pread(descriptors[part], size, offset)), name=self.name(index)))
            return found
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)


def open(config: Config, *, split: str) -> TarSamples:
    """The samples of `train`, `val` or `test`.

    Raises:
        DataError: Missing, truncated or damaged archives, members that are no regular files, samples without an image
            or a label, labels that are none.
    """
    import hashlib

    import numpy as np

    files: list[Path] = []
    shards: list[_Shard] = []
    splits: list[str] = []
    for name, pattern in zip(SPLITS, (config.shards, config.val_shards, config.test_shards), strict=True):
        key = f"data.source.{'shards' if name == 'train' else f'{name}_shards'}"
        for path in find(pattern, suffixes=(".tar",), key=key) if pattern is not None else ():
            if path in files:
                raise DataError(f"{key}: {path} is there already", hint="every file may be of one split, once")
            files.append(path)
            shards.append(_index(path, stamp(path, key=key), config.label, config.label_key))
            splits.append(name)
    counts = [len(shard.keys) for shard in shards]
    split_of = np.repeat(splits, counts)
    class_names, labels = name_labels(
        [shard.labels for shard in shards],
        is_train=[name == "train" for name in splits],
        class_names=config.class_names,
        base=files[0].parent,
        where=lambda part, row: f"{files[part]}: sample {shards[part].keys[row]!r}",
    )
    keys = [
        int.from_bytes(hashlib.sha256(f"{path.name}/{key}".encode()).digest()[:8])
        for path, shard in zip(files, shards, strict=True)
        for key in shard.keys
    ]
    chosen = pick(labels, keys, split_of, split=split, config=config, class_names=class_names, base=files[0].parent)
    columns = {
        name: np.concatenate([np.frombuffer(getattr(shard, name), dtype) for shard in shards])[chosen]
        for name, dtype in (("offsets", np.int64), ("sizes", np.int64), ("digests", np.uint64))
    }
    every = [key for shard in shards for key in shard.keys]
    names = tuple(every[i] for i in chosen.tolist())
    window = config.window if config.order == "shards" else None
    digest = hashlib.sha256(repr((class_names, window)).encode())
    digest.update("\0".join(names).encode())
    digest.update(labels[chosen].astype("<i8").tobytes() + columns["digests"].astype("<u8").tobytes())
    return TarSamples(
        columns=pictures_of(class_names),
        files=tuple(files),
        stamps=tuple(shard.stamp for shard in shards),
        parts=np.repeat(np.arange(len(files), dtype=np.int32), counts)[chosen],
        labels=labels[chosen],
        keys=names,
        window=window,
        fingerprint=digest.hexdigest(),
        **columns,
    )


# -- one archive ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """Columns of one archive: int64 offsets and sizes and uint64 digests as bytes; numbers or names as labels."""

    stamp: Stamp
    keys: tuple[str, ...]
    labels: tuple[Label, ...]
    offsets: bytes
    sizes: bytes
    digests: bytes


@dataclass
class _Sample:
    image: Member | None = None
    label: Member | None = None


@cache
def _index(path: Path, known: Stamp, label: str, label_key: str) -> _Shard:
    """Size and time are here so that a changed file is read again."""
    from array import array

    descriptor = open_unchanged(path, known)
    try:
        samples = _grouped(read_members(descriptor, archive=str(path), size_bytes=known[0]), path=path, label=label)
        labels: list[Label] = []
        offsets, sizes, digests = array("q"), array("q"), array("Q")
        for key, sample in samples.items():
            where = f"{path}: sample {key!r}"
            if sample.image is None:
                raise DataError(f"{where}: no image ({' '.join(IMAGES)})", hint="write the archive without it")
            if sample.label is None:
                raise DataError(f"{where}: no label ({label})", hint="--set data.source.label=cls, txt or json")
            labels.append(_label(_bytes_of(descriptor, sample.label, where=where), label, label_key, where=where))
            offsets.append(sample.image.offset)
            sizes.append(sample.image.size_bytes)
            digests.append(_digest(descriptor, sample.image))
    finally:
        os.close(descriptor)
    if not samples:
        raise DataError(f"{path}: no samples in it", hint="remove the file")
    return _Shard(known, tuple(samples), tuple(labels), offsets.tobytes(), sizes.tobytes(), digests.tobytes())


def _grouped(members: Iterator[Member], *, path: Path, label: str) -> dict[str, _Sample]:
    """By name up to the first dot of its last part, as webdataset does it."""
    samples: dict[str, _Sample] = {}
    latest = ""
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        if base.startswith((".", "__")):
            continue
        stem, dot, extension = base.partition(".")
        if not dot:
            raise DataError(
                f"{path}: member {member.name!r}: no extension to say what it is", hint="write the archive without it"
            )
        key = folder + slash + stem
        if key != latest and key in samples:
            raise DataError(
                f"{path}: member {member.name!r}: a sample of this name stands earlier in the archive",
                hint="give every sample a name of its own, and write its files one after another",
            )
        latest, sample = key, samples.setdefault(key, _Sample())
        extension = extension.lower()
        if extension in IMAGES:
            sample.image = _once(sample.image, member, path=path)
        elif extension == label:
            sample.label = _once(sample.label, member, path=path)
    return samples


def _once(known: Member | None, member: Member, *, path: Path) -> Member:
    if known is not None:
        raise DataError(
            f"{path}: member {member.name!r}: the sample has {known.name!r} already",
            hint="one image and one label for each sample",
        )
    return member


def _bytes_of(descriptor: int, member: Member, *, where: str) -> bytes:
    if member.size_bytes > MAX_LABEL_BYTES:
        raise DataError(f"{where}: a label of {member.size_bytes:,} bytes", hint="--set data.source.label=...")
    return os.pread(descriptor, member.size_bytes, member.offset)


def _digest(descriptor: int, member: Member) -> int:
    """Of size, beginning and end: these lie beside headers that have been read anyway."""
    import hashlib

    size, offset = member.size_bytes, member.offset
    ends = os.pread(descriptor, min(size, _END_BYTES), offset)
    if size > _END_BYTES:
        ends += os.pread(descriptor, _END_BYTES, offset + max(_END_BYTES, size - _END_BYTES))[: size - _END_BYTES]
    return int.from_bytes(hashlib.blake2b(b"%d\0" % size + ends, digest_size=8).digest())


def _label(body: bytes, kind: str, key: str, *, where: str) -> Label:
    """A class by number, or by name."""
    import json

    try:
        text = body.decode().strip()
        value: Any = json.loads(text)[key] if kind == "json" else int(text) if kind == "cls" else text
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        said = repr(body[:40].decode("utf-8", "replace"))
        expected = {"cls": "a number", "txt": "a name in UTF-8", "json": f"an object with the key {key!r}"}[kind]
        raise DataError(f"{where}: the label {said}, expected {expected}", hint=f"see its .{kind}") from error
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"{where}: the label {value!r}, expected a number or a name", hint=f"see its .{kind}")
    return value
