"""Samples per second of the loader, against torchvision's ImageFolder in a DataLoader with the same transforms."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bmctl.core.stats import ratio_interval
from bmctl.engine.loading import data
from bmctl.engine.loading.loader import open_loader
from bmctl.inputs import Resolved
from bmctl.inputs.image import Spec
from bmctl.recipe.sections import Recipe

pytestmark = pytest.mark.bench

ROUNDS = int(os.environ.get("BMCTL_BENCH_ROUNDS", "30"))
SLOWER = 1.0
"""Of the time ratio's interval the lower end: what is slower than that is slower beyond doubt."""
BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "vision" / "tuxpaint160"
TRAIN = {"crop": {}, "flip": True}


@pytest.fixture(scope="module", params=["drawn", "photos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of 500 x 375, as in ImageNet; or real ones of 160 pixels."""
    if request.param == "photos":
        if not PHOTOS.exists():
            pytest.skip("needs tuxpaint160")
        return PHOTOS
    root = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for index in range(160):
        path = root / "ab"[index % 2] / f"{index:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def bmctl_epochs(root: Path, *, augmented: bool, num_workers: int, held: ExitStack) -> Iterator[int]:
    source = {"kind": "folder", "root": str(root), "val": 0.01, "test": 0.01}
    sections = {"source": source, "input": {"augment": TRAIN if augmented else {}}}
    recipe = Recipe.model_validate({"name": "bench", "model": {"name": "bmctl:mlp"}, "data": sections})
    to = Spec(size=(224, 224), channels=3, mean=MEAN, std=STD)
    split = data.open_split(data.Data(recipe), name="train", given=Resolved(to), augment=True)
    loader = held.enter_context(open_loader(split, seed=0, batch_size=BATCH, num_workers=num_workers))
    for epoch in range(10**9):
        yield sum(len(batch["label"]) for batch in loader.batches(epoch=epoch))


def torchvision_epochs(root: Path, *, augmented: bool, num_workers: int, held: ExitStack) -> Iterator[int]:
    geometry = (
        [v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()] if augmented else [v2.Resize((224, 224))]
    )
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    loader = torch.utils.data.DataLoader(
        ImageFolder(str(root), v2.Compose([*geometry, *to_tensor])),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    while True:
        yield sum(len(y) for x, y in loader)


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_slower_than_a_plain_data_loader(
    folder: Path, augmented: bool, num_workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    given = {"augmented": augmented, "num_workers": num_workers}
    with ExitStack() as held:
        ours = bmctl_epochs(folder, **given, held=held)
        theirs = torchvision_epochs(folder, **given, held=held)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        takers: list[tuple[str, Callable[[], int]]] = [("ours", ours.__next__), ("theirs", theirs.__next__)]
        for turn in range(ROUNDS + 1):
            for name, take in takers if turn % 2 else takers[::-1]:
                began = time.perf_counter()
                count = take()
                if turn:  # the first starts the processes
                    times[name].append((time.perf_counter() - began) / count)
    low, high = ratio_interval(times["ours"], times["theirs"])
    ratio = np.median(times["ours"]) / np.median(times["theirs"])
    with capsys.disabled():
        print(
            f"\n{folder.name} {given}: {1 / np.median(times['ours']):.0f} samples/s, "
            f"torchvision {1 / np.median(times['theirs']):.0f}; time ratio {ratio:.2f} [{low:.2f}, {high:.2f}]"
        )
    assert low <= SLOWER
