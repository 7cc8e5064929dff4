"""Computing blocks again changes memory, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from bmctl.engine.computing.recompute import keep_activations, recompute_blocks
from bmctl.engine.modules.blocks import find_blocks
from bmctl.errors import UnsupportedError
from bmctl.models.own.networks import MLP, ResCNN


class Spectral(nn.Module):
    """Its forward reads the buffers that it changes: a power iteration each time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.second = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Spectral() for _ in range(3)))

    def forward(self, x):
        return self.blocks(x.flatten(1)[:, :8])


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def densenet() -> nn.Module:
    import torchvision

    return torchvision.models.DenseNet(8, (2, 2), 8, drop_rate=0.3, num_classes=10)


def vit() -> nn.Module:
    import timm

    name = "vit_tiny_patch16_224"
    return timm.create_model(name, img_size=32, depth=3, num_classes=10, drop_rate=0.1, drop_path_rate=0.4)


def rescnn() -> nn.Module:
    return ResCNN(num_classes=10, channels=3, width=8)


MAKERS = [rescnn, resnet, densenet, vit, Chain]


def train(model: nn.Module, *, steps: int = 3) -> dict[str, torch.Tensor]:
    """Everything that a few steps leave behind."""
    torch.manual_seed(1)
    found = {}
    for step in range(steps):
        x = torch.randn(4, 3, 32, 32)
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        found |= {f"grad {step} {name}": each.grad.clone() for name, each in model.named_parameters()}
        with torch.no_grad():
            for each in model.parameters():
                each -= 0.01 * each.grad
    return found | {"random": torch.get_rng_state()} | {k: v.clone() for k, v in model.state_dict().items()}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().train()


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_buffers_and_luck_are_bitwise_equal(make) -> None:
    plain, again = build(make), build(make)
    assert recompute_blocks(again) == len(find_blocks(again))
    assert differing(train(plain), train(again)) == []


@pytest.mark.parametrize("make", [rescnn, vit])
def test_bf16_too(make) -> None:
    plain, again = build(make), build(make)
    recompute_blocks(again)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert differing(train(plain), train(again)) == []


def saved_bytes(model: nn.Module) -> int:
    """What one forward pass keeps for the backward pass: what autograd saves, and the inputs of blocks."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = [block.register_forward_pre_hook(lambda _, args: keep(args[0])) for block in find_blocks(model).values()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(torch.randn(16, 3, 32, 32))
    for handle in inputs:
        handle.remove()
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    del outputs
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("make", [rescnn, resnet, vit])
def test_less_is_kept(make) -> None:
    model = build(make)
    before = saved_bytes(model)
    recompute_blocks(model)
    assert saved_bytes(model) < 0.7 * before
    keep_activations(model)
    assert saved_bytes(model) == before


@pytest.fixture
def counted() -> Iterator[list[int]]:
    counts = [0]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    yield counts
    handle.remove()


def test_nothing_is_computed_again_outside_of_training(counted) -> None:
    model = build(rescnn)
    names = list(model.state_dict()), [type(module) for module in model.modules()]
    recompute_blocks(model)
    assert names == (list(model.state_dict()), [type(module) for module in model.modules()])
    model.eval()
    (gradient,) = torch.autograd.grad(model(torch.ones(2, 3, 32, 32)).sum(), model.head.weight)
    once = counted[0]
    model.train()
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    assert gradient.shape == model.head.weight.shape
    assert counted[0] - once > once


def test_undone_it_is_as_before() -> None:
    model = build(rescnn)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    recompute_blocks(model)
    assert recompute_blocks(model) == 3, "twice is once"
    keep_activations(model)
    assert all(vars(module) == before[name] for name, module in model.named_modules())


def test_a_copy_computes_with_its_own_weights() -> None:
    model = build(rescnn)
    recompute_blocks(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
    fresh = build(rescnn)
    assert differing(train(twin), train(fresh)) == []
    keep_activations(twin)
    assert not any("forward" in vars(module) for module in twin.modules())


def test_it_can_be_exported() -> None:
    model = build(rescnn)
    recompute_blocks(model)
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)


def test_without_blocks_it_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="MLP repeats no blocks") as caught:
        recompute_blocks(MLP(num_inputs=4, num_classes=2))
    assert caught.value.exit_code == 11
    assert caught.value.hint == "--set train.activation_checkpointing=false"
