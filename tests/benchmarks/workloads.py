"""What the contenders train: a model, its optimizer, and real images in memory.

x_BCHW: a batch of normalised images; y_B: their classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bmctl.engine.loading.loader import open_loader
from bmctl.engine.loading.split import Split
from bmctl.fit import SGD, AdamW
from bmctl.inputs import Resolved
from bmctl.inputs.image import Spec
from bmctl.sources import bundled
from bmctl.sources.samples import array_samples
from bmctl.tasks import classify

NUM_CLASSES = 10
BATCHES = 16
"""Of an epoch."""


@dataclass(frozen=True)
class Workload:
    """One model to train on images of `size` pixels."""

    make: Callable[[], nn.Module]
    size: int
    batch_size: int
    optimizer: SGD | AdamW

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train()


class Featherweight(nn.Module):
    """Costs next to nothing, and has as many parameters to look after as a ResNet-18: 62."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(61))
        self.head = nn.Linear(1, NUM_CLASSES, bias=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(x_BCHW.flatten(1).mean(1, keepdim=True) * torch.cat(list(self.scales)).mean())


def resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=NUM_CLASSES)


def transformer(*, size: int = 128, patch: int = 8) -> nn.Module:
    """Six layers of 384, 256 tokens."""
    import timm

    return timm.create_model("vit_small_patch16_224", img_size=size, patch_size=patch, depth=6, num_classes=NUM_CLASSES)


WORKLOADS = {
    "resnet18": Workload(resnet18, size=128, batch_size=32, optimizer=SGD(name="sgd", lr=0.01)),
    "transformer": Workload(transformer, size=128, batch_size=8, optimizer=AdamW(lr=3e-4)),
    "featherweight": Workload(Featherweight, size=1, batch_size=32, optimizer=SGD(name="sgd", lr=0.01)),
}


def split_of(workload: Workload, *, num_samples: int) -> Split:
    """Fashion-MNIST enlarged to the workload's size, three channels of uint8, in memory."""
    samples = bundled.open(bundled.Config(), split="train")
    pixels = torch.from_numpy(np.array(samples.arrays["picture"][:num_samples]))[:, None].float()
    large = nn.functional.interpolate(pixels, size=(workload.size, workload.size), mode="bilinear", antialias=True)
    images_BHWC = large.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    labels = np.array(samples.arrays["label"][:num_samples])
    chosen = array_samples(images_BHWC, labels, class_names=samples.columns["label"].names)
    spec = Spec(
        size=(workload.size, workload.size), channels=3, mean=(0.286,) * 3, std=(0.353,) * 3, interpolation="bilinear"
    )
    task = classify.Config()
    facts = classify.facts(chosen.columns, task, {})
    return Split(chosen, np.arange(num_samples), chosen.fingerprint, Resolved(spec), task, facts)


def batches_of(workload: Workload, *, channels_last: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch as float32 tensors: what bmctl's own loader makes of `split_of`, made once and for all."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    split = split_of(workload, num_samples=BATCHES * workload.batch_size)
    with open_loader(split, seed=0, batch_size=workload.batch_size) as loader:
        made = list(loader.batches(epoch=0))
    return [(batch["input"].contiguous(memory_format=layout), batch["label"]) for batch in made]
