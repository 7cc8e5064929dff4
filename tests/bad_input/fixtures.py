"""What rows of cases.yaml start from. Each function makes files in `work`; what is slow is made once, in `cache`."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

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


def run_in(folder: Path, *command: str) -> None:
    with contextlib.chdir(folder):
        assert main(command) == 0


def copy(made: Path, work: Path) -> None:
    shutil.copytree(made, work, dirs_exist_ok=True, symlinks=True)


def future_manifest(work: Path, *, cache: Path) -> None:
    edit_manifest(work, format=99)


def manifest_of_another_model(work: Path, *, cache: Path) -> None:
    path = work / "run/packages/00-train/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["args"]["hidden"] = [9]
    path.write_text(json.dumps(manifest))


def edit_manifest(work: Path, **fields: object) -> None:
    path = work / "run/packages/00-train/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def pickle_as_pt(work: Path, *, cache: Path) -> None:
    """A state dict that would run a command when unpickled."""
    # protocol 0: import os.system, call it with a string
    payload = b"cposix\nsystem\n(S'touch pwned'\ntR."
    (work / "evil.pt").write_bytes(payload)
    (work / "evil.safetensors").write_bytes(payload)
    target = work / "run/packages/00-train/weights.safetensors"
    if target.exists():
        target.write_bytes(payload)
