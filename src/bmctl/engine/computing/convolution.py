"""Convolutions of a training step on a CPU, computed as matrix products where oneDNN's own kernels are slow.

With AMX oneDNN convolves large images at the speed of its matrix product, and small images with many channels at a
fifth of it: a tile has 16 rows, and it fills them from one row of the image. Copying the patches of such an image into
the rows of a matrix (im2col) costs little, and one matrix product does the rest.

x_NHWC: an image, channels last; w_OhwC: a kernel of h x w with T = h * w taps; dy: the gradient of the outputs y_NHWO;
m: rows of patches, one per output pixel of a batch; K = T * C.
Sources: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006
(im2col); Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285 (the transpose).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bmctl.engine.computing.tiles import trains_in_bf16

Pair = tuple[int, int]


class Shape(NamedTuple):
    """What a convolution is, without its numbers."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def num_inputs(self) -> int:
        """Of one output: K."""
        return self.kernel[0] * self.kernel[1] * self.channels

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding[0] - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding[1] - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1


class Products(NamedTuple):
    """Which of the three parts of a convolution are computed as matrix products."""

    forward: bool
    data: bool
    weight: bool


_NONE = Products(False, False, False)

MAX_COPIED = 2**26
"""Numbers in the rows of patches of one layer: 128 MiB."""


def choose(shape: Shape) -> Products:
    """Which parts a matrix product computes faster than oneDNN's convolution does.

    A rule of shapes alone, so that a run is the same each time; tests/benchmarks/test_kernels.py measures what it
    is derived from.
    """
    is_strided, width = shape.stride != (1, 1), shape.out_width
    most, least = max(shape.channels, shape.out_channels), min(shape.channels, shape.out_channels)
    if is_strided and shape.dilation != (1, 1):
        return _NONE
    is_pixel = shape.kernel == (1, 1) and shape.padding == (0, 0)
    if is_pixel and not is_strided:
        return Products(shape.channels >= 128, most >= 128, width <= 8 and least >= 128)
    if shape.batch * shape.out_height * width * shape.num_inputs > MAX_COPIED:
        return _NONE
    # A core's own cache holds 2**20 numbers in bf16.
    num_weights = shape.out_channels * shape.num_inputs
    is_big, is_middling = num_weights >= 2**20, num_weights >= 2**18
    if shape.kernel == shape.stride and shape.padding == (0, 0) and not is_pixel:
        return Products(num_weights >= 2**17, is_middling and width <= 8, num_weights >= 2**17)
    if least < 64:
        return _NONE
    if is_pixel:
        return Products(width <= 4 or (is_big and width <= 8), most >= 192, width <= 8 and least >= 128)
    reach = 16 if is_big or (is_strided and is_middling) else 8 if is_middling else 4
    return Products(width <= 8 and reach == 16, width <= 8 and is_big, width <= reach)


# -- a layer -----------------------------------------------------------------------------------------

_native = nn.Conv2d._conv_forward


@contextmanager
def tuned() -> Iterator[None]:
    """Compute convolutions in bf16 on the CPU the faster way, wherever a model has one of torch's layers.

    It holds for forward passes with gradients, in channels_last; activations that are computed again in the backward
    pass need it there too. All else computes as ever: layers with groups, with a padding by name or mode, of a class
    that convolves in its own way, and whatever torch.compile takes over.
    """
    assert nn.Conv2d._conv_forward is _native, "already tuned"
    nn.Conv2d._conv_forward = _conv_forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Conv2d._conv_forward = _native  # type: ignore[method-assign]


def _conv_forward(layer: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In place of nn.Conv2d._conv_forward."""
    products = _products(layer, x, weight)
    if not any(products):
        return _native(layer, x, weight, bias)
    y: torch.Tensor = _Convolution.apply(x.to(torch.bfloat16), weight, bias, _shape(layer, x), products)
    return y


def _is_eligible(layer: nn.Conv2d) -> bool:
    return (
        type(layer)._conv_forward is _conv_forward
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _products(layer: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor) -> Products:
    """By the rule, where the rule holds."""
    if not _is_eligible(layer) or not trains_in_bf16(x, weight) or x.dim() != 4:
        return _NONE
    if weight.shape != (layer.out_channels, x.shape[1], *layer.kernel_size):
        return _NONE
    if not x.is_contiguous(memory_format=torch.channels_last):
        return _NONE
    shape = _shape(layer, x)
    is_empty = min(shape.batch, shape.channels, shape.out_height, shape.out_width) <= 0
    return _NONE if is_empty else choose(shape)


def _shape(layer: nn.Conv2d, x: torch.Tensor) -> Shape:
    batch, channels, height, width = x.shape
    kernel, stride, padding, dilation = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    assert not isinstance(padding, str)
    assert len(kernel) == len(stride) == len(padding) == len(dilation) == 2
    return Shape(batch, channels, height, width, layer.out_channels, kernel, stride, padding, dilation)


class _Convolution(torch.autograd.Function):
    """A convolution in bf16, each part as `Products` says; gradients of weights come in the type of the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shape: Shape,
        products: Products,
    ) -> torch.Tensor:
        half = weight.to(torch.bfloat16)
        half_bias = bias.to(torch.bfloat16) if bias is not None else None
        ctx.save_for_backward(x, half, weight)
        ctx.shape, ctx.products = shape, products
        ctx.bias_dtype = bias.dtype if bias is not None else None
        with torch.autocast("cpu", enabled=False):
            if products.forward:
                y = forward(x.permute(0, 2, 3, 1), half.permute(0, 2, 3, 1), half_bias, shape=shape)
                return y.permute(0, 3, 1, 2)
            return F.conv2d(x, half, half_bias, shape.stride, shape.padding, shape.dilation)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, half, weight = ctx.saved_tensors
        shape, products = ctx.shape, ctx.products
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # A gradient of this gradient is asked for: torch knows how to differentiate its own operator.
            half, products = weight.to(torch.bfloat16), _NONE
        dx = dw = None
        dy = dy.contiguous(memory_format=torch.channels_last)
        dy_NHWO = dy.permute(0, 2, 3, 1)
        if needs_x and products.data:
            dx = data_gradient(dy_NHWO, half.permute(0, 2, 3, 1), shape=shape).permute(0, 3, 1, 2)
        if needs_weight and products.weight:
            dw = weight_gradient(dy_NHWO, x.permute(0, 2, 3, 1), shape=shape).to(weight.dtype).permute(0, 3, 1, 2)
        rest = [needs_x and dx is None, needs_weight and dw is None, needs_bias]
        db = None
        if any(rest):
            found = torch.ops.aten.convolution_backward(
                dy, x, half, [shape.out_channels], shape.stride, shape.padding, shape.dilation, False, [0, 0], 1, rest
            )
            dx = found[0] if rest[0] else dx
            dw = found[1].to(weight.dtype) if rest[1] else dw
            db = found[2].to(ctx.bias_dtype) if rest[2] else None
        return dx, dw, db, None, None


# -- the three parts ---------------------------------------------------------------------------------


def forward(x_NHWC: torch.Tensor, w_OhwC: torch.Tensor, bias: torch.Tensor | None, *, shape: Shape) -> torch.Tensor:
    """The outputs, NHWO."""
    y_mO = F.linear(_forward_rows(x_NHWC, shape), w_OhwC.reshape(shape.out_channels, -1), bias)
    return y_mO.view(shape.batch, shape.out_height, shape.out_width, shape.out_channels)


def weight_gradient(dy_NHWO: torch.Tensor, x_NHWC: torch.Tensor, *, shape: Shape) -> torch.Tensor:
    """The gradient of the kernel, OhwC."""
    dy_mO, rows_mK = dy_NHWO.reshape(-1, shape.out_channels), _forward_rows(x_NHWC, shape)
    # A product whose left side lies transposed in memory is slower than a copy of the smaller side and a product.
    if shape.out_channels <= shape.num_inputs:
        dw_OK = dy_mO.t().contiguous() @ rows_mK
    else:
        dw_OK = (rows_mK.t().contiguous() @ dy_mO).t()
    return dw_OK.reshape(shape.out_channels, *shape.kernel, shape.channels)


def data_gradient(dy_NHWO: torch.Tensor, w_OhwC: torch.Tensor, *, shape: Shape) -> torch.Tensor:
    """The gradient of the image, NHWC: `dy` convolved with the mirrored kernel.

    With a stride s, every s-th row and column of the image meets the same taps of the kernel: each such part of the
    image is a dense convolution of its own.
    """
    (stride_h, stride_w), w_TOC = shape.stride, w_OhwC.reshape(shape.out_channels, -1, shape.channels).transpose(0, 1)
    if shape.stride == (1, 1):
        return _part_of_gradient(dy_NHWO, w_TOC, _Axis.of(shape, 0, 0), _Axis.of(shape, 1, 0))
    dx_NHWC = dy_NHWO.new_zeros(shape.batch, shape.height, shape.width, shape.channels)
    for row in range(min(stride_h, shape.height)):
        for column in range(min(stride_w, shape.width)):
            vertical, horizontal = _Axis.of(shape, 0, row), _Axis.of(shape, 1, column)
            if vertical.taps and horizontal.taps:
                dx_NHWC[:, row::stride_h, column::stride_w] = _part_of_gradient(dy_NHWO, w_TOC, vertical, horizontal)
    return dx_NHWC


class _Axis(NamedTuple):
    """One axis of the part of an image that starts at one row and takes every s-th.

    Attributes:
        taps: Of the kernel, that meet this part, in the order of the outputs they meet it in.
        first: Output that the first row meets with the first tap; negative in the padding.
        size: Rows of the part.
        dilation: Outputs from one tap to the next.
        num_kernel: Taps of the whole kernel.
    """

    taps: tuple[int, ...]
    first: int
    size: int
    dilation: int
    num_kernel: int

    @classmethod
    def of(cls, shape: Shape, axis: int, start: int) -> _Axis:
        kernel, stride = shape.kernel[axis], shape.stride[axis]
        padding, dilation = shape.padding[axis], shape.dilation[axis]
        assert stride == 1 or dilation == 1
        # Row i meets output o with tap t where i + padding = o * stride + t * dilation.
        taps = tuple(reversed(range((start + padding) % stride, kernel, stride)))
        first = (start + padding - taps[0] * dilation) // stride if taps else 0
        size = len(range(start, (shape.height, shape.width)[axis], stride))
        return cls(taps, first, size, dilation, kernel)

    def padding(self, num_outputs: int) -> Pair:
        """Zeros before the first output and after the last; a negative number cuts outputs off."""
        return -self.first, self.first + self.size + (len(self.taps) - 1) * self.dilation - num_outputs


def _part_of_gradient(dy_NHWO: torch.Tensor, w_TOC: torch.Tensor, vertical: _Axis, horizontal: _Axis) -> torch.Tensor:
    num_taps, _, num_channels = w_TOC.shape
    taps = [i * horizontal.num_kernel + j for i in vertical.taps for j in horizontal.taps]
    if taps != list(range(num_taps)):
        w_TOC = w_TOC.index_select(0, torch.tensor(taps))
    rows_mK = _rows(
        dy_NHWO,
        kernel=(len(vertical.taps), len(horizontal.taps)),
        stride=(1, 1),
        dilation=(vertical.dilation, horizontal.dilation),
        before_after=(*vertical.padding(dy_NHWO.shape[1]), *horizontal.padding(dy_NHWO.shape[2])),
        size=(vertical.size, horizontal.size),
    )
    part_mC = rows_mK @ w_TOC.reshape(-1, num_channels)
    return part_mC.view(dy_NHWO.shape[0], vertical.size, horizontal.size, num_channels)


def _forward_rows(x_NHWC: torch.Tensor, shape: Shape) -> torch.Tensor:
    (pad_h, pad_w), size = shape.padding, (shape.out_height, shape.out_width)
    return _rows(
        x_NHWC,
        kernel=shape.kernel,
        stride=shape.stride,
        dilation=shape.dilation,
        before_after=(pad_h, pad_h, pad_w, pad_w),
        size=size,
    )


def _rows(
    x_NHWC: torch.Tensor,
    *,
    kernel: Pair,
    stride: Pair,
    dilation: Pair,
    before_after: tuple[int, int, int, int],
    size: Pair,
) -> torch.Tensor:
    """The patches of an image as rows [m, K]; a view where a patch is one pixel."""
    top, bottom, left, right = before_after
    if any(before_after):
        x_NHWC = F.pad(x_NHWC, (0, 0, left, right, top, bottom))
    if kernel == stride == (1, 1):
        return x_NHWC.reshape(-1, x_NHWC.shape[3])
    x_NHWC = x_NHWC.contiguous()
    _, height, width, num_channels = x_NHWC.shape
    image, row, pixel = height * width * num_channels, width * num_channels, num_channels
    patches = x_NHWC.as_strided(
        (x_NHWC.shape[0], *size, *kernel, num_channels),
        (image, stride[0] * row, stride[1] * pixel, dilation[0] * row, dilation[1] * pixel, 1),
    )
    return patches.reshape(-1, kernel[0] * kernel[1] * num_channels)
