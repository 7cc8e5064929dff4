"""Attention's backward pass in whole products: as exact as torch's own, and only where it holds."""

from __future__ import annotations

import pytest
import torch
from tests.engine.computing.steps import TransformerStep, assert_close
from torch.nn import functional as F

from bmctl.engine.computing import attention
from bmctl.engine.computing.attention import tuned

NATIVE = F.scaled_dot_product_attention


@pytest.fixture
def calls(monkeypatch) -> list[torch.Size]:
    """Shapes of the queries whose gradients were computed here."""
    made: list[torch.Size] = []
    real = attention.gradients

    def recorded(do, q, *rest, **named):
        made.append(q.shape)
        return real(do, q, *rest, **named)

    monkeypatch.setattr(attention, "gradients", recorded)
    return made


def heads(batch: int = 2, queries: int = 17, keys: int = 17, *, spread: float = 1.0) -> list[torch.Tensor]:
    """q, k, v and do [B, H, N, D], as a projection leaves them; `spread` of q and k."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(queries, spread), (keys, spread), (keys, 1.0), (queries, 1.0)]
    made = [s * torch.randn(batch, size, 3, 16, generator=generator) for size, s in sizes]
    return [tensor.bfloat16().transpose(1, 2) for tensor in made]


def gradients(tensors: list[torch.Tensor], **named) -> list[torch.Tensor]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    o = F.scaled_dot_product_attention(q, k, v, **named)
    return [o.detach(), *torch.autograd.grad(o, [q, k, v], tensors[3])]


@pytest.mark.parametrize("named", [{}, {"is_causal": True}, {"scale": 0.5}])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 1), (3, 17, 17), (2, 33, 33), (2, 5, 40)])
@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize("most_kept", [0, 8])
def test_it_is_as_exact_as_torchs_own(calls, monkeypatch, named, batch, queries, keys, spread, most_kept) -> None:
    if "is_causal" in named and queries != keys:
        pytest.skip("torch says nothing of the alignment")
    monkeypatch.setattr(attention, "MOST_KEPT", most_kept)
    tensors = heads(batch, queries, keys, spread=spread)
    exact = gradients([tensor.double() for tensor in tensors], **named)
    native = gradients(tensors, **named)
    with tuned():
        ours = gradients(tensors, **named)
    assert calls == [tensors[0].shape]
    assert most_kept or torch.equal(ours[0], native[0]), "without kept matrices the forward pass is torch's"
    for mine, theirs, true in zip(ours, native, exact, strict=True):
        floor = 0.006 * float(true.norm())
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert float((mine - true).norm()) <= max(1.5 * float((theirs - true).norm()), floor) + 1e-6


@pytest.mark.parametrize("most_kept", [0, 8])
def test_samples_a_few_at_a_time_give_the_same(monkeypatch, most_kept) -> None:
    monkeypatch.setattr(attention, "MOST_KEPT", most_kept)
    tensors = heads(5)
    with tuned():
        whole = gradients(tensors)
        monkeypatch.setattr(attention, "MAX_SCORES", 2 * 3 * 17 * 17)
        parts = gradients(tensors)
    assert all(torch.allclose(one, other, rtol=0.01, atol=1e-3) for one, other in zip(whole, parts, strict=True))


@pytest.mark.parametrize(("keys", "kept"), [(128, True), (129, False)])
def test_only_small_attention_matrices_are_kept(keys, kept) -> None:
    """Eight keys per number of a head, which has 16 here."""
    q, k, v = (tensor.requires_grad_() for tensor in heads(2, keys, keys)[:3])
    with tuned(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda _: None):
        saved: list[torch.Size] = []
        F.scaled_dot_product_attention(q, k, v)
    assert (torch.Size([2, 3, keys, keys]) in saved) == kept


@pytest.mark.parametrize(("queries", "is_ours"), [(767, True), (768, False)])
def test_many_queries_are_torchs(calls, queries, is_ours) -> None:
    with tuned():
        gradients(heads(1, queries, 8))
    assert bool(calls) == is_ours


def test_numbers_repeat_bit_for_bit() -> None:
    tensors = heads(4, 65, 65)
    with tuned():
        first, second = gradients(tensors), gradients(tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_transformer_layer_trains_as_ever(calls) -> None:
    step = TransformerStep()
    plain = step.gradients()
    with tuned():
        mine, recomputed = step.gradients(), step.gradients(again=True)
    assert len(calls) == 2
    assert_close(mine, plain)
    assert all(map(torch.equal, mine, recomputed))


@pytest.mark.parametrize(
    "named", [{"dropout_p": 0.5}, {"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, {"enable_gqa": True}]
)
def test_masks_dropout_and_groups_compute_as_ever(calls, named) -> None:
    with tuned():
        torch.manual_seed(0)
        mine = gradients(heads(), **named)
    torch.manual_seed(0)
    assert all(torch.equal(one, other) for one, other in zip(mine, gradients(heads(), **named), strict=True))
    assert not calls


def test_inference_fp32_and_compiled_models_compute_as_ever(calls) -> None:
    q, k, v, do = heads()
    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, k, v), backend="eager")
    with tuned():
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v)
        gradients([tensor.float() for tensor in (q, k, v, do)])
        compiled(q.detach().requires_grad_()).float().sum().backward()
    assert not calls


def test_torchs_function_comes_back() -> None:
    with pytest.raises(ValueError, match="on purpose"), tuned():
        assert F.scaled_dot_product_attention is not NATIVE
        raise ValueError("on purpose")
    assert F.scaled_dot_product_attention is NATIVE
