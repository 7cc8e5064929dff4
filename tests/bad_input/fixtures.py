"""What rows of cases.yaml start from. Each function makes files in `work`; what is slow is made once, in `cache`.

What a function returns is kept until the row is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save

from bmctl.cli import main

RECIPE = """\
name: tiny
model: {name: "bmctl:mlp", args: {hidden: [8]}}
data: {source: SOURCE}
train: {epochs: 1, batch_size: 4, precision: fp32}
export: {backends: [onnxruntime], measure: {batch_size: 4, rounds: 3}}
"""


def write_recipe(work: Path, source: str) -> None:
    (work / "r.yaml").write_text(RECIPE.replace("SOURCE", source))


def pictures(folder: Path, *, count: int, seed: int, size: int = 8) -> None:
    """`count` grey PNG images of noise, each different."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / f"{i:02}.png")


def folder(work: Path, *, cache: Path) -> None:
    """data/{train,val,test}/{a,b}/*.png and r.yaml: 12, 4 and 4 images of each class."""
    for i, (split, count) in enumerate({"train": 12, "val": 4, "test": 4}.items()):
        for j, name in enumerate("ab"):
            pictures(work / "data" / split / name, count=count, seed=10 * i + j)
    write_recipe(work, "{kind: folder, root: data}")


def tar_files(work: Path, *, cache: Path) -> None:
    """data/a.tar, data/b.tar: 15 grey images of two classes each, every one with a .cls; and r.yaml."""
    pictures(work / "loose", count=30, seed=0)
    (work / "data").mkdir()
    for part, name in enumerate("ab"):
        with tarfile.open(work / "data" / f"{name}.tar", "w") as archive:
            for i in range(15 * part, 15 * part + 15):
                add_member(archive, f"{i:02}.png", (work / "loose" / f"{i:02}.png").read_bytes())
                add_member(archive, f"{i:02}.cls", str(i % 2).encode())
    shutil.rmtree(work / "loose")
    write_recipe(work, "{kind: webdataset, shards: data}")


def add_member(archive: tarfile.TarFile, name: str, body: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    archive.addfile(info, io.BytesIO(body))


def odd_tar_files(work: Path, *, cache: Path) -> None:
    """data/ of `tar_files` with one more archive, x.tar of odd/: each of one member that does not belong there."""
    tar_files(work, cache=cache)
    link = tarfile.TarInfo("x.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    (work / "odd").mkdir()
    members: dict[str, list[tarfile.TarInfo]] = {"link": [link], "climbing": [tarfile.TarInfo("../../x.png")]}
    members |= {"unlabelled": [tarfile.TarInfo("x.png")], "nameless": [tarfile.TarInfo("x")]}
    for name, infos in members.items():
        with tarfile.open(work / "odd" / f"{name}.tar", "w") as archive:
            for info in infos:
                archive.addfile(info)
    with tarfile.open(work / "odd" / "letters.tar", "w") as archive:
        add_member(archive, "x.png", b"")
        add_member(archive, "x.cls", b"cat")
    with (
        tarfile.open(work / "data" / "a.tar") as whole,
        tarfile.open(work / "odd" / "negative.tar", "w") as archive,
    ):
        for info in whole:
            body = whole.extractfile(info)
            assert body is not None
            add_member(archive, info.name, b"-1" if info.name == "03.cls" else body.read())


def lines(work: Path, *, cache: Path) -> None:
    """data/a.csv.gz: 30 rows of a label and 64 pixels; and r.yaml."""
    rows = np.random.default_rng(0).integers(0, 256, (30, 64))
    text = "".join(",".join(map(str, [i % 2, *row])) + "\n" for i, row in enumerate(rows.tolist()))
    (work / "data").mkdir()
    (work / "data" / "a.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (work / "data" / "a.csv").write_text(text)
    write_recipe(work, "{kind: stream, path: data/a.csv.gz, shape: [8, 8]}")


def odd_images(work: Path, *, cache: Path) -> None:
    """Images that are not what an 8-bit still is, in odd/."""
    odd = work / "odd"
    odd.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(odd / "deep.png")
    frames = [Image.fromarray(np.roll(noise, i, axis=0)) for i in range(3)]
    frames[0].save(odd / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(odd / "moving.png", save_all=True, append_images=frames[1:])
    frames[0].save(odd / "really.gif")
    frames[0].save(odd / "good.jpg")
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    (odd / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    Image.fromarray(noise[:4, :4, 0]).save(odd / "small.png")
    Image.fromarray(noise).convert("CMYK").save(odd / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees
    Image.fromarray(noise[..., 0]).save(odd / "turned.png", exif=exif)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def swap_in(name: str, target: str) -> Callable[..., None]:
    """A fixture that puts one odd image in place of another."""

    def swap(work: Path, *, cache: Path) -> None:
        shutil.copyfile(work / "odd" / name, work / target)

    return swap


deep_png = swap_in("deep.png", "data/train/a/03.png")
moving_webp = swap_in("moving.webp", "data/train/a/03.webp")
moving_png = swap_in("moving.png", "data/train/a/03.png")
gif_named_png = swap_in("really.gif", "data/train/a/03.png")
jpeg_named_png = swap_in("good.jpg", "data/train/a/03.png")
huge_png = swap_in("huge.png", "data/train/a/03.png")
small_png = swap_in("small.png", "data/train/a/03.png")
cmyk_jpg = swap_in("cmyk.jpg", "data/train/a/03.png")
turned_png = swap_in("turned.png", "data/train/a/03.png")


def leak(work: Path, *, cache: Path) -> None:
    """Training images again in validation."""
    for i in range(4):
        shutil.copyfile(work / f"data/train/a/{i:02}.png", work / f"data/val/a/{i:02}.png")


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())


def idx(work: Path, *, cache: Path) -> None:
    """MNIST's four files in data/, 40 and 20 images of 8x8, and r.yaml."""
    data = work / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in {"train": 40, "t10k": 20}.items():
        write_idx(data / f"{prefix}-images-idx3-ubyte", rng.integers(0, 256, (count, 8, 8)))
        write_idx(data / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 2)
    write_recipe(work, "{kind: idx, root: data, val: 0.25}")


def csv(work: Path, *, cache: Path) -> None:
    """list.csv with path, label and split of 24 images, and r.yaml."""
    pictures(work / "images", count=24, seed=0)
    rows = [f"images/{i:02}.png,{'ab'[i % 2]},{'train' if i < 12 else 'val' if i < 18 else 'test'}" for i in range(24)]
    (work / "list.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    write_recipe(work, "{kind: csv, path: list.csv}")


def trained(work: Path, *, cache: Path) -> None:
    """The folder data set, and a run/ with one trained package."""
    made = cache / "trained"
    if not made.is_dir():
        made.mkdir()
        folder(made, cache=cache)
        run_in(made, "train", "-r", "r.yaml", "-o", "run")
    copy(made, work)


def exported(work: Path, *, cache: Path) -> None:
    """The same with run/deploy/onnxruntime."""
    made = cache / "exported"
    if not made.is_dir():
        made.mkdir()
        trained(made, cache=cache)
        run_in(made, "export", "run")
    copy(made, work)


def unfinished(work: Path, *, cache: Path) -> None:
    """The same as `trained`, but that the package is not there yet: only checkpoints are."""
    trained(work, cache=cache)
    shutil.rmtree(work / "run/packages")


def third_class(work: Path, *, cache: Path) -> None:
    """One more class of images in data/."""
    for i, split in enumerate(("train", "val", "test")):
        pictures(work / "data" / split / "c", count=4, seed=100 + i)


def quoted_lines(work: Path, *, cache: Path) -> None:
    """list.csv with a byte order mark, and the name of a file with a line break in it."""
    (work / "images" / "00.png").rename(work / "images" / "0\n0.png")
    text = (work / "list.csv").read_text().replace("images/00.png", '"images/0\n0.png"')
    (work / "list.csv").write_text(text, encoding="utf-8-sig")


def future_onnx(work: Path, *, cache: Path) -> None:
    """m.onnx with operators of a set that does not exist yet."""
    write_onnx(work / "m.onnx", opset=99)


def run_in(folder: Path, *command: str) -> None:
    with contextlib.chdir(folder):
        assert main(command) == 0


def copy(made: Path, work: Path) -> None:
    shutil.copytree(made, work, dirs_exist_ok=True, symlinks=True)


def frozen(work: Path, *, cache: Path) -> None:
    """A run, ice/, with one frozen package, made of a foreign ONNX file."""
    made = cache / "frozen"
    if not made.is_dir():
        made.mkdir()
        write_onnx(made / "m.onnx")
        run_in(made, "import", "m.onnx", "-o", "ice")
    copy(made, work)


PACKAGE = Path("run/packages/00-train")


def rewrite(work: Path, *, weights: bytes | None = None, **fields: Any) -> None:
    """Change a package as somebody would who also mends the manifest's sizes and hashes."""
    manifest = json.loads((work / PACKAGE / "manifest.json").read_text())
    if weights is not None:
        (work / PACKAGE / "weights.safetensors").write_bytes(weights)
        record = {"size_bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        manifest["files"]["weights.safetensors"] = record
    (work / PACKAGE / "manifest.json").write_text(json.dumps({**manifest, **fields}))


def future_manifest(work: Path, *, cache: Path) -> None:
    rewrite(work, format=99)


def manifest_of_another_model(work: Path, *, cache: Path) -> None:
    rewrite(work, model=model_of(work, hidden=[9]))


def manifest_of_an_unknown_model(work: Path, *, cache: Path) -> None:
    rewrite(work, model={**model_of(work), "name": "os:system"})


def model_of(work: Path, **args: Any) -> dict[str, Any]:
    model = json.loads((work / PACKAGE / "manifest.json").read_text())["model"]
    return {**model, "args": {**model["args"], **args}}


def weights_of(work: Path, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    tensors = load_file(work / PACKAGE / "weights.safetensors")
    return save({name: change(tensor) for name, tensor in tensors.items()})


def nan_weights(work: Path, *, cache: Path) -> None:
    rewrite(work, weights=weights_of(work, lambda tensor: np.full_like(tensor, np.nan)))


def half_weights(work: Path, *, cache: Path) -> None:
    rewrite(work, weights=weights_of(work, lambda tensor: tensor.astype(np.float16)))


EVIL = b"cposix\nsystem\n(S'touch pwned'\ntR."
"""A pickle that runs a command when it is read."""


def evil(work: Path, *, cache: Path) -> None:
    (work / "evil.pt").write_bytes(EVIL)
    (work / "evil.safetensors").write_bytes(EVIL)


def evil_package(work: Path, *, cache: Path) -> None:
    rewrite(work, weights=EVIL)


def write_onnx(path: Path, *, location: str = "", opset: int = 20) -> None:
    """x [N, 4] times a matrix, whose values stand in an external file if `location` names one."""
    weights = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    if location:
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=location)
        weights.external_data.add(key="offset", value="0")
        weights.external_data.add(key="length", value="64")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def onnx_with_data_at(location: str) -> Callable[..., None]:
    """A fixture that writes m.onnx with its weights elsewhere."""

    def write(work: Path, *, cache: Path) -> None:
        write_onnx(work / "m.onnx", location=location)

    return write


onnx_escaping = onnx_with_data_at("../home/secret.bin")
onnx_absolute = onnx_with_data_at("/etc/passwd")
onnx_beside = onnx_with_data_at("w.bin")


def requests(work: Path, *, cache: Path) -> None:
    """Arrays that do not fit the trained model, which takes x [N, 1, 8, 8]."""
    good = np.zeros((2, 1, 8, 8), np.float32)
    np.savez(work / "name.npz", pictures=good)
    np.savez(work / "shape.npz", input=np.zeros((2, 1, 9, 9), np.float32))
    np.savez(work / "dtype.npz", input=np.array(["a", "b"]))
    np.savez(work / "nan.npz", input=np.full_like(good, np.nan))
    np.savez(work / "none.npz", input=good[:0])
    np.savez(work / "object.npz", input=np.array([{"a": 1}], dtype=object), allow_pickle=True)


def locked(work: Path, *, cache: Path) -> IO[str]:
    """run/ is being written to, for as long as the returned file is open."""
    file = (work / "run/.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file
