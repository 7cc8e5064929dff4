"""What engine/computing replaces of torch's kernels; for convolutions the table that its rule is derived from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from tests.benchmarks import handtuned

from bmctl.engine.computing import attention, convolution, linear
from bmctl.engine.computing.convolution import Products, Shape, choose
from bmctl.engine.computing.tiles import has_tiles

NUM_ROUNDS = 9
NEAR_BEST = 1.1
"""All parts as chosen, over the faster of the two for each: where they are about equal, nine rounds wander by that."""
RESNET18 = [
    (64, 32, 64, 3, 1), (64, 32, 128, 3, 2), (64, 32, 128, 1, 2), (128, 16, 128, 3, 1), (128, 16, 256, 3, 2),
    (128, 16, 256, 1, 2), (256, 8, 256, 3, 1), (256, 8, 512, 3, 2), (256, 8, 512, 1, 2), (512, 4, 512, 3, 1),
]  # fmt: skip
RESNET50 = [
    (256, 32, 64, 1, 1), (256, 32, 128, 1, 1), (128, 32, 128, 3, 2), (128, 16, 512, 1, 1), (512, 16, 128, 1, 1),
    (256, 32, 512, 1, 2), (256, 16, 256, 3, 2), (256, 8, 1024, 1, 1), (1024, 8, 256, 1, 1), (512, 16, 1024, 1, 2),
    (512, 8, 512, 3, 2), (512, 4, 2048, 1, 1), (2048, 4, 512, 1, 1), (1024, 8, 2048, 1, 2),
]  # fmt: skip
AT_224 = [(64, 56, 64, 3, 1), (128, 28, 128, 3, 1), (256, 14, 256, 3, 1), (512, 7, 512, 3, 1), (256, 14, 512, 3, 2)]
RESCNN = [(1, 28, 32, 3, 1), (32, 28, 32, 3, 1), (32, 28, 64, 3, 2), (64, 14, 64, 3, 1), (64, 14, 128, 3, 2),
          (64, 14, 128, 1, 2), (128, 7, 128, 3, 1)]  # fmt: skip
EFFICIENT = [(16, 64, 96, 1, 1), (24, 32, 144, 1, 1), (240, 16, 40, 1, 1), (480, 8, 112, 1, 1), (112, 8, 672, 1, 1),
             (672, 4, 192, 1, 1), (320, 4, 1280, 1, 1)]  # fmt: skip
CONVNEXT = [(3, 128, 96, 4, 4), (96, 32, 192, 2, 2), (192, 16, 384, 2, 2), (384, 8, 768, 2, 2)]
LAYERS = [(384, 1152), (384, 384), (384, 1536), (1536, 384), (768, 2304), (768, 3072), (3072, 768)]
SHAPES = [
    *(("resnet18 128 px", 32, row) for row in RESNET18),
    *(("resnet18 batch 8", 8, row) for row in RESNET18),
    *(("resnet50 128 px", 32, row) for row in RESNET50),
    *(("resnet18 224 px", 16, row) for row in AT_224),
    *(("rescnn 28 px", 128, row) for row in RESCNN),
    *(("efficientnet", 32, row) for row in EFFICIENT),
    *(("convnext", 32, row) for row in CONVNEXT),
    ("vit_small", 8, (3, 256, 384, 16, 16)),
    ("vgg16 224 px", 8, (512, 14, 512, 3, 1)),
]

needs_tiles = pytest.mark.skipif(not has_tiles(), reason="this CPU has no AMX")


def shape_of(batch: int, row: tuple[int, int, int, int, int]) -> Shape:
    channels, size, out_channels, kernel, stride = row
    padding = 0 if kernel == stride else kernel // 2
    return Shape(batch, channels, size, size, out_channels, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1))


def compare(native: Callable[[], object], mine: Callable[[], object]) -> tuple[float, float, float]:
    """Shortest times in ms and the median of `native` over `mine`, of interleaved rounds."""
    times: list[tuple[float, float]] = []
    for _ in range(NUM_ROUNDS + 1):
        start = time.perf_counter()
        native()
        middle = time.perf_counter()
        mine()
        times.append((middle - start, time.perf_counter() - middle))
    times = times[1:]
    shortest = [1e3 * min(column) for column in zip(*times, strict=True)]
    return shortest[0], shortest[1], statistics.median(a / b for a, b in times)


def measure(shape: Shape) -> list[tuple[float, float, float]]:
    """Of forward pass, gradient of the data and gradient of the weights, as `compare` gives them."""
    x = torch.randn(shape.batch, shape.channels, shape.height, shape.width).bfloat16()
    w = torch.randn(shape.out_channels, shape.channels, *shape.kernel).bfloat16()
    x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
    geometry = (shape.stride, shape.padding, shape.dilation)
    dy = torch.randn_like(torch.conv2d(x, w, None, *geometry))
    x_NHWC, w_OhwC, dy_NHWO = (tensor.permute(0, 2, 3, 1) for tensor in (x, w, dy))

    def backward(mask: list[bool]) -> tuple[torch.Tensor, ...]:
        return torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, False, [0, 0], 1, mask)

    return [
        compare(
            lambda: torch.conv2d(x, w, None, *geometry),
            lambda: convolution.forward(x_NHWC, w_OhwC, None, shape=shape),
        ),
        compare(
            lambda: backward([True, False, False]), lambda: convolution.data_gradient(dy_NHWO, w_OhwC, shape=shape)
        ),
        compare(
            # What autograd does with the gradient of a channels_last weight in fp32.
            lambda: backward([False, True, False])[1].float().contiguous(memory_format=torch.channels_last),
            lambda: convolution.weight_gradient(dy_NHWO, x_NHWC, shape=shape).float(),
        ),
    ]


@pytest.mark.bench
@pytest.mark.timeout(1500)
@needs_tiles
def test_the_rule_chooses_what_is_faster() -> None:
    """Over all shapes; a single one may err where the two are about equal."""
    torch.manual_seed(0)
    chosen, best = 0.0, 0.0
    print(f"\n{'':18}{'batch':>5} {'C':>4}  {'O':>4} {'px':>4} k s   native ms, product ms, ratio (* chosen)")
    for name, batch, row in SHAPES:
        shape = shape_of(batch, row)
        cells = []
        for part, is_chosen in zip(measure(shape), choose(shape), strict=True):
            native, product, ratio = part
            cells.append(f"{native:7.2f} {product:7.2f} {ratio:5.2f}{'*' if is_chosen else ' '}")
            chosen += product if is_chosen else native
            best += min(native, product)
        channels, size, out_channels, kernel, stride = row
        print(f"{name:18}{batch:5} {channels:4}->{out_channels:4} {size:4} {kernel} {stride}  {' |'.join(cells)}")
    print(f"all parts: {chosen:.0f} ms as chosen, {best:.0f} ms at best")
    assert chosen <= NEAR_BEST * best


@pytest.mark.bench
@needs_tiles
def test_attention_takes_less_time() -> None:
    """Forward and backward; the last shape has too many keys for its matrices to be kept."""
    handtuned.keep_freed_memory()
    print("\nbatch heads tokens   torch ms,  bmctl ms, ratio")
    for batch, heads, tokens in [(8, 6, 257), (32, 6, 65), (8, 12, 197), (16, 8, 128), (2, 12, 640)]:
        qkv = torch.randn(batch, tokens, 3, heads, 64).bfloat16().permute(2, 0, 3, 1, 4)
        do = torch.randn(batch, tokens, heads, 64).bfloat16().transpose(1, 2)
        inputs = [tensor.requires_grad_() for tensor in qkv.unbind(0)]

        def step(inputs: list[torch.Tensor] = inputs, do: torch.Tensor = do) -> None:
            torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*inputs), inputs, do)

        native, product, ratio = compare(step, under(attention.tuned, step))
        print(f"{batch:5} {heads:5} {tokens:6}   {native:8.1f}  {product:8.1f} {ratio:6.2f}")
        assert ratio > 1


@pytest.mark.bench
@needs_tiles
def test_linear_layers_take_less_time() -> None:
    """Forward and backward, over all shapes: where the bias is a small part of it, there is little to win."""
    handtuned.keep_freed_memory()
    print("\n rows    in ->  out   torch ms,  bmctl ms, ratio")
    ours, theirs = 0.0, 0.0
    for rows in (512, 2056, 8192):
        for num_in, num_out in [
            (384, 1152),
            (384, 384),
            (384, 1536),
            (1536, 384),
            (768, 2304),
            (768, 3072),
            (3072, 768),
        ]:
            x = torch.randn(rows, num_in).bfloat16().requires_grad_()
            w, b = (torch.randn(*size).bfloat16().requires_grad_() for size in [(num_out, num_in), (num_out,)])
            dy = torch.randn(rows, num_out).bfloat16()

            def step(inputs: tuple[torch.Tensor, ...] = (x, w, b), dy: torch.Tensor = dy) -> None:
                torch.autograd.grad(torch.nn.functional.linear(*inputs), inputs, dy)

            native, product, ratio = compare(step, under(linear.tuned, step))
            theirs, ours = theirs + native, ours + product
            print(f"{rows:5} {num_in:5} -> {num_out:4}   {native:8.2f}  {product:8.2f} {ratio:6.2f}")
    print(f"all: {ours:.0f} ms, torch {theirs:.0f} ms")
    assert ours < theirs


def under(tuned: Callable[[], AbstractContextManager[None]], step: Callable[[], None]) -> Callable[[], None]:
    def tuned_step() -> None:
        with tuned():
            step()

    return tuned_step


def test_every_shape_of_the_table_can_be_computed() -> None:
    for _, batch, row in SHAPES:
        assert isinstance(choose(shape_of(batch, row)), Products)
