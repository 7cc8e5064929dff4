"""Linear layers as oneDNN's products: as exact as torch's own, and only where it holds.

x_MI: rows of inputs; w_OI: a weight; b_O: a bias.
"""

from __future__ import annotations

import pytest
import torch
from tests.engine.computing.steps import TransformerStep, assert_close
from torch.nn import functional as F

from bmctl.engine.computing import linear
from bmctl.engine.computing.linear import tuned

NATIVE = F.linear
pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 products on this CPU"
)


@pytest.fixture
def calls(monkeypatch) -> list[torch.Size]:
    """Shapes of the weights whose gradients were computed here; layers of any size are."""
    made: list[torch.Size] = []
    real = linear.weight_gradient

    def recorded(dy_MO, x_MI):
        dw_OI = real(dy_MO, x_MI)
        made.append(dw_OI.shape)
        return dw_OI

    monkeypatch.setattr(linear, "weight_gradient", recorded)
    monkeypatch.setattr(linear, "MIN_OUTPUTS", 1)
    return made


def layer(rows: tuple[int, ...], inputs: int, outputs: int) -> list[torch.Tensor]:
    """x, w, b in fp32, and the gradient of the outputs in bf16."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(*rows, inputs), (outputs, inputs), (outputs,)]
    x, w, b = (torch.randn(*size, generator=generator).requires_grad_() for size in sizes)
    return [x, w, b, torch.randn(*rows, outputs, generator=generator).bfloat16()]


def outputs_and_gradients(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """In bf16, but float64 stays."""
    *leaves, dy = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=leaves[0].dtype == torch.float32):
        y = F.linear(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [((1,), 1, 1), ((7,), 16, 33), ((3, 5), 48, 16), ((2, 3, 4), 40, 8), ((0, 4), 8, 8)]
)
@pytest.mark.parametrize("copied", [1, 768])
def test_it_is_as_exact_as_torchs_own(calls, monkeypatch, rows, inputs, outputs, copied) -> None:
    monkeypatch.setattr(linear, "MIN_COPIED", copied)
    tensors = layer(rows, inputs, outputs)
    exact = outputs_and_gradients(
        [each.detach().bfloat16().double().requires_grad_() for each in tensors[:3]] + [tensors[3].double()]
    )
    native = outputs_and_gradients(tensors)
    with tuned():
        ours = outputs_and_gradients(tensors)
    assert calls == ([torch.Size([outputs, inputs])] if 0 not in rows else [])
    for mine, theirs, true in zip(ours, native, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        error, other = float((mine - true).norm()), float((theirs - true).norm())
        assert error <= max(1.2 * other, 0.004 * float(true.norm())) + 1e-6


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 2304), (2304, 768), (768, 1000)])
def test_all_three_products_are_the_weights_gradient(inputs, outputs) -> None:
    dy_MO, x_MI = torch.randn(9, outputs).bfloat16(), torch.randn(9, inputs).bfloat16()
    torch.testing.assert_close(linear.weight_gradient(dy_MO, x_MI), dy_MO.t() @ x_MI)


def test_a_transformer_layer_trains_as_ever(calls) -> None:
    step = TransformerStep()
    plain = step.gradients()
    with tuned():
        mine, recomputed = step.gradients(), step.gradients(again=True)
    assert len(calls) == 8
    assert_close(mine, plain)
    assert all(map(torch.equal, mine, recomputed))


def test_gradients_of_gradients_reach_the_weight(calls) -> None:
    """As a gradient penalty wants them."""

    def penalty() -> list[torch.Tensor]:
        x, w, b, _ = layer((5,), 12, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.linear(x, w, b).tanh()
        (dx,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), (w, b)))

    plain = penalty()
    with tuned():
        mine = penalty()
    assert calls
    assert_close(mine, plain)


def test_small_layers_layers_without_bias_inference_fp32_and_compiled_models_compute_as_ever(
    calls, monkeypatch
) -> None:
    x, w, b, _ = layer((5,), 12, 6)
    compiled = torch.compile(lambda x: F.linear(x, w, b), backend="eager")
    with tuned():
        F.linear(x, w, b).sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            F.linear(x, w).float().sum().backward()
            compiled(x).float().sum().backward()
            with torch.no_grad():
                F.linear(x, w, b)
            monkeypatch.setattr(linear, "MIN_OUTPUTS", 5 * 6 + 1)
            F.linear(x, w, b).float().sum().backward()
    assert not calls


@pytest.mark.parametrize(("x", "w", "b"), [((6, 4), (3, 5), (3,)), ((6, 4), (3, 4), (2,)), ((6, 4), (3, 4, 1), (3,))])
def test_wrong_shapes_raise_what_torch_raises(calls, x, w, b) -> None:
    tensors = [torch.randn(*size, requires_grad=True) for size in (x, w, b)]

    def raised() -> str:
        with pytest.raises(RuntimeError) as caught, torch.autocast("cpu", dtype=torch.bfloat16):
            F.linear(*tensors)
        return str(caught.value)

    plain = raised()
    with tuned():
        assert raised() == plain


def test_torchs_function_comes_back() -> None:
    with pytest.raises(ValueError, match="on purpose"), tuned():
        assert F.linear is not NATIVE
        raise ValueError("on purpose")
    assert F.linear is NATIVE
