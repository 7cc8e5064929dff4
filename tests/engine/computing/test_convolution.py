"""Convolutions as matrix products: as exact as oneDNN's, in every geometry, and without a trace in the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from bmctl.engine.computing import convolution
from bmctl.engine.computing.convolution import Products, Shape, choose, tuned

ALL = Products(True, True, True)
NAMES = ("output", "data", "weight", "bias")


@pytest.fixture
def everywhere(monkeypatch) -> None:
    """Products for every shape that the rule could choose them for."""
    strided = lambda shape: shape.stride != (1, 1) and shape.dilation != (1, 1)  # noqa: E731
    monkeypatch.setattr(convolution, "choose", lambda shape: Products(False, False, False) if strided(shape) else ALL)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The parts that were computed as products, in order."""
    made: list[str] = []
    for name in ("forward", "data_gradient", "weight_gradient"):
        _record(monkeypatch, name, made)
    return made


def _record(monkeypatch: pytest.MonkeyPatch, name: str, made: list[str]) -> None:
    real = getattr(convolution, name)

    def recorded(*args: object, **named: object) -> torch.Tensor:
        made.append(name)
        return real(*args, **named)

    monkeypatch.setattr(convolution, name, recorded)


def layer_of(channels: int = 64, out_channels: int = 64, kernel: int = 3, *, seed: int = 0, **named) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(channels, out_channels, kernel, **named).to(memory_format=torch.channels_last)


def images(batch: int = 2, channels: int = 64, size: int = 4, *, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)


def step(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients of x and of all parameters, under autocast, of a loss that weighs each output."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    parameters = [p for p in module.parameters() if p.requires_grad] if isinstance(module, nn.Module) else []
    return [y.detach(), *torch.autograd.grad((y * weigh).sum(), [x, *parameters])]


def reference(layer: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    """What `step` would give if nothing but its bf16 inputs were rounded."""
    exact = copy.deepcopy(layer).double()
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().double()
    x = x.detach().bfloat16().double().requires_grad_()
    y = exact(x)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().double()
    return [y.detach(), *torch.autograd.grad((y * weigh).sum(), [x, *exact.parameters()])]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check(layer: nn.Conv2d, x: torch.Tensor) -> None:
    """No further from the exact numbers than oneDNN in bf16, but for the luck of single roundings."""
    native = step(layer, x)
    with tuned():
        assert convolution._is_eligible(layer)
        ours = step(layer, x)
    for name, mine, theirs, exact in zip(NAMES, ours, native, reference(layer, x), strict=False):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
        assert error(mine, exact) <= max(1.1 * error(theirs, exact), 0.003), name


# -- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (5, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)])
def test_every_geometry_gives_the_exact_numbers(kernel, stride, padding) -> None:
    """In float64, against torch; images larger and smaller than the stride, odd and even, wide and high."""
    torch.manual_seed(0)
    for dilation, height, width in itertools.product([(1, 1), (2, 1), (2, 3)], [1, 4, 7], [2, 5, 8]):
        shape = Shape(2, 3, height, width, 5, kernel, stride, padding, dilation)
        if any(s > 1 and d > 1 for s, d in zip(stride, dilation, strict=True)):
            continue
        if min(shape.out_height, shape.out_width) < 1:
            continue
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        w = torch.randn(5, 3, *kernel, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(5, dtype=torch.float64)
        y = F.conv2d(x, w, bias, stride, padding, dilation)
        dy = torch.randn_like(y)
        dx, dw = torch.autograd.grad(y, [x, w], dy)
        x_NHWC, w_OhwC, dy_NHWO = (tensor.detach().permute(0, 2, 3, 1) for tensor in (x, w, dy))
        found = [
            convolution.forward(x_NHWC, w_OhwC, bias, shape=shape),
            convolution.data_gradient(dy_NHWO, w_OhwC, shape=shape),
            convolution.weight_gradient(dy_NHWO, x_NHWC, shape=shape),
        ]
        for mine, theirs in zip(found, (y, dx, dw), strict=True):
            torch.testing.assert_close(mine.permute(0, 3, 1, 2), theirs, msg=str(shape))


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(),
        layer_of(kernel=3, padding=1),
        layer_of(kernel=3, padding=1, bias=False),
        layer_of(out_channels=96, kernel=3, stride=2, padding=1),
        layer_of(kernel=1),
        layer_of(out_channels=128, kernel=1, stride=2, bias=False),
        layer_of(kernel=2, stride=2),
        layer_of(kernel=3, padding=2, dilation=2),
        layer_of(kernel=(1, 3), padding=(0, 1), stride=(2, 1)),
        layer_of(kernel=1, padding=1),
        layer_of(out_channels=7, kernel=3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1),
    ],
    ids=str,
)
@pytest.mark.parametrize(("batch", "size"), [(1, 4), (3, 7)])
def test_bf16_is_as_exact_as_onednn(everywhere, layer: nn.Conv2d, batch: int, size: int) -> None:
    check(layer, images(batch, size=size))


def test_a_real_shape_is_as_exact_as_onednn() -> None:
    layer = layer_of(256, 512, 3, stride=2, padding=1, bias=False)
    assert choose(Shape(8, 256, 8, 8, 512, (3, 3), (2, 2), (1, 1), (1, 1))) == ALL
    check(layer, images(8, 256, 8))


def test_images_that_are_views_are_read_where_they_lie(everywhere, calls) -> None:
    layer = layer_of(padding=1)
    whole = images(4, size=9)
    views = [whole[1:3], whole[::2], images(4, 128)[:, 32:96], whole[:, :, 1:, 2:7], whole.contiguous()]
    for view in views:
        plain = step(layer, view.clone(memory_format=torch.channels_last))
        with tuned():
            mine = step(layer, view)
        for one, other in zip(mine, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))
    assert calls, "no view was computed as a product"


def test_numbers_repeat_bit_for_bit(everywhere) -> None:
    """On the same number of threads; oneDNN may split its sums otherwise on another."""
    layer, x = layer_of(padding=1), images()
    with tuned():
        first, second = step(layer, x), step(copy.deepcopy(layer), x.clone())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# -- which gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [s for s in itertools.product([True, False], repeat=3) if any(s)])
def test_only_what_is_asked_for_is_computed(everywhere, calls, needs: tuple[bool, bool, bool]) -> None:
    layer, x = layer_of(padding=1), images()
    needs_x, layer.weight.requires_grad, layer.bias.requires_grad = needs
    plain, mine = copy.deepcopy(layer), layer
    for module in (plain, mine):
        x_own = x.detach().requires_grad_(needs_x)
        with tuned() if module is mine else torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            module(x_own).float().square().sum().backward()
        module.x_grad = x_own.grad
    expected = ["forward", "data_gradient", "weight_gradient"] if needs[0] or needs[1] else []
    assert calls == [name for name, need in zip(expected, (True, *needs), strict=False) if need]
    for one, other in [(mine.x_grad, plain.x_grad), *((a.grad, b.grad) for a, b in pairs(mine, plain))]:
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def pairs(one: nn.Module, other: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return list(zip(one.parameters(), other.parameters(), strict=True))


def test_a_module_used_twice_sums_its_gradients(everywhere) -> None:
    layer, x = layer_of(padding=1, bias=False), images()
    plain = step(nn.Sequential(layer, nn.ReLU(), layer), x)
    with tuned():
        mine = step(nn.Sequential(layer, nn.ReLU(), layer), x)
    for one, other in zip(mine, plain, strict=True):
        assert error(one, other.double()) < 0.01


def test_gradients_of_weights_come_as_the_weights_lie(everywhere) -> None:
    layer = layer_of(padding=1)
    with tuned(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(images()).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_pure_bf16_stays_bf16(everywhere, calls) -> None:
    layer, x = layer_of(padding=1).bfloat16(), images().bfloat16().requires_grad_()
    with tuned():
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16
    assert len(calls) == 3


def test_a_gradient_has_a_gradient(everywhere) -> None:
    """A penalty on the norm of a gradient trains as ever."""
    layer, x = layer_of(padding=1, bias=False), images()

    def penalty() -> torch.Tensor:
        x_own = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x_own).float().square().sum()
        (dx,) = torch.autograd.grad(y, x_own, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), layer.weight)[0]

    plain = penalty()
    with tuned():
        assert error(penalty(), plain.double()) < 0.02


def test_checkpointed_activations_give_the_same_bits(everywhere, calls) -> None:
    model, x = nn.Sequential(layer_of(padding=1), nn.ReLU(), layer_of(padding=1, seed=2)), images()
    with tuned():
        plain = step(model, x)
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(model, x, use_reentrant=False)
        weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
        mine = torch.autograd.grad((y * weigh).sum(), [x, *model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(mine, plain[1:], strict=True))
    assert calls.count("forward") == 2 + 4


def test_processes_exchange_the_gradients(everywhere, calls, tmp_path) -> None:
    layer, x = layer_of(padding=1), images()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(copy.deepcopy(layer), gradient_as_bucket_view=True)
        with tuned(), torch.autocast("cpu", dtype=torch.bfloat16):
            for module in (layer, shared):
                module(x).float().square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(calls) == 4
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs(layer, shared))


# -- where it does not apply ------------------------------------------------------------------------------


def test_it_leaves_no_trace(everywhere) -> None:
    """In a model or in a copy that is made meanwhile, such as the one that fsdp gathers its weights into."""
    model, native = nn.Sequential(layer_of(), nn.Sequential(layer_of(kernel=1))), nn.Conv2d._conv_forward
    before = [(set(vars(module)), list(module.state_dict())) for module in model.modules()]
    with pytest.raises(RuntimeError, match="4D"), tuned():
        copied = copy.deepcopy(model)
        assert nn.Conv2d._conv_forward is not native
        model(torch.zeros(1, 3))
    assert nn.Conv2d._conv_forward is native
    for each in (model, copied):
        assert [(set(vars(module)), list(module.state_dict())) for module in each.modules()] == before


def test_hooks_and_parametrizations_keep_working(everywhere, calls) -> None:
    class Half(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return w / 2

    layer, seen = layer_of(), []
    parametrize.register_parametrization(layer, "weight", Half())
    layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    plain = step(layer, images())
    with tuned():
        mine = step(layer, images())
    assert len(seen) == 2 and len(calls) == 3
    assert all(error(one, other.double()) < 0.01 for one, other in zip(mine, plain, strict=True))


def test_inference_and_fp32_compute_as_ever(everywhere, calls) -> None:
    layer, x = layer_of(), images()
    with tuned():
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)
        layer(x).sum().backward()
        with torch.autocast("cpu", dtype=torch.float16):
            layer(x)
    assert not calls


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(groups=2),
        layer_of(padding="same"),
        layer_of(padding=1, padding_mode="reflect"),
        nn.Conv1d(64, 64, 3),
        nn.ConvTranspose2d(64, 64, 3),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(everywhere, calls, layer: nn.Module) -> None:
    with tuned(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(images() if not isinstance(layer, nn.Conv1d) else images()[:, :, 0])
    assert not calls


def test_images_of_another_layout_or_no_images_are_left_alone(everywhere, calls) -> None:
    layer = layer_of(padding=1)
    with tuned(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(images().contiguous())
        layer(images()[0])
        layer(images()[:0])
        with pytest.raises(RuntimeError, match="channels"):
            layer(images(channels=32))
    assert not calls


def test_a_compiled_or_transformed_model_is_left_alone(everywhere, calls) -> None:
    layer, x = layer_of(padding=1), images()
    compiled = torch.compile(layer, backend="eager")
    with tuned(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(x)
        torch.func.vmap(lambda image: layer(image))(x[:, None])
    assert not calls


def test_a_class_that_convolves_in_its_own_way_is_left_alone(everywhere, calls) -> None:
    class Own(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / 2, bias)

    layer, x = Own(64, 64, 3).to(memory_format=torch.channels_last), images()
    plain = step(layer, x)
    with tuned():
        mine = step(layer, x)
    assert not calls and all(map(torch.equal, mine, plain))


# -- the rule ---------------------------------------------------------------------------------------------


def square(
    batch: int, channels: int, size: int, out: int, kernel: int, stride: int = 1, *, padding: int | None = None
) -> Shape:
    pad = kernel // 2 if padding is None else padding
    return Shape(batch, channels, size, size, out, (kernel, kernel), (stride, stride), (pad, pad), (1, 1))


@pytest.mark.parametrize(
    ("shape", "products"),
    [
        (square(32, 512, 4, 512, 3), (True, True, True)),
        (square(32, 256, 8, 512, 3, 2), (True, True, True)),
        (square(32, 256, 8, 256, 3), (False, False, True)),
        (square(32, 64, 32, 64, 3), (False, False, False)),
        (square(32, 3, 128, 64, 7, 2), (False, False, False)),
        (square(128, 1, 28, 32, 3), (False, False, False)),
        (square(8, 3, 256, 384, 16, 16, padding=0), (True, False, True)),
        (square(32, 2048, 4, 512, 1), (True, True, True)),
        (square(32, 1024, 8, 2048, 1, 2), (True, True, True)),
        (square(4096, 512, 4, 512, 3), (False, False, False)),
    ],
)
def test_the_rule_follows_the_table(shape: Shape, products: tuple[bool, bool, bool]) -> None:
    assert choose(shape) == products


def test_the_rule_never_chooses_what_it_cannot_compute() -> None:
    for stride, dilation, kernel, channels in itertools.product([1, 2], [1, 2], [1, 2, 3], [16, 128, 512]):
        shape = Shape(4, channels, 8, 8, channels, (kernel,) * 2, (stride,) * 2, (1, 1), (dilation,) * 2)
        if stride > 1 and dilation > 1:
            assert not any(choose(shape))
