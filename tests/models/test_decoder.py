"""Causal language models, our own and those of transformers: what a token sees, and what a cache may not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.specs import causal_spec, text_spec
from torch import nn

from bmctl import models
from bmctl.errors import RecipeError
from bmctl.models.own.decoder import Decoder

SMALL = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotary": ("bmctl:decoder", SMALL),
    "learned": ("bmctl:decoder", SMALL | {"positions": "learned", "norm": "layer", "tied": False}),
    "sinusoidal": ("bmctl:decoder", SMALL | {"positions": "sinusoidal", "kv_heads": 1}),
    "gpt2": ("transformers:gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": (
        "transformers:llama",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64,
        },
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    name, args = KINDS[request.param]
    torch.manual_seed(0)
    model = models.build(models.resolve(causal_spec(name, args=args))).eval()
    with torch.no_grad():  # as if it had been trained: what it starts with is too small for anything to be seen
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


def empty(model: Any, num: int) -> list[torch.Tensor]:
    return [torch.zeros(num, heads, 0, numbers) for heads, numbers in model.cache for _ in range(2)]


@torch.no_grad()
def cached(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor, *cuts: int) -> torch.Tensor:
    """Logits of all places, with the tokens given in pieces."""
    past, found = empty(model, len(tokens)), []
    for start, end in zip((0, *cuts), (*cuts, tokens.shape[1]), strict=True):
        at = torch.arange(end - start).expand(len(tokens), -1)
        logits, *past = model(tokens[:, start:end], mask[:, :end], at, *past)
        found.append(logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(model: nn.Module) -> None:
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 50
    found, changed = model(tokens, mask), model(other, mask)
    assert torch.equal(found[:, :5], changed[:, :5])
    assert (found[:, 5:] != changed[:, 5:]).any(dim=-1).all(), "and everything from it on"


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 3, 8)])
def test_a_cache_changes_nothing(model: nn.Module, cuts: tuple[int, ...]) -> None:
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    assert torch.allclose(cached(model, tokens, mask, *cuts), model(tokens, mask), atol=2e-5)


@torch.no_grad()
def test_padding_anywhere_in_the_cache_changes_nothing(model: nn.Module) -> None:
    """Texts of 3 and 6 tokens, padded before, behind and between, then gone on with."""
    tokens = ids(1, 6)
    alone = model(tokens, torch.ones(1, 6, dtype=torch.int64))[0, -1]
    for places in ((2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 6, 7), (0, 3, 4, 5, 6, 7)):
        padded, mask = torch.full((1, 8), 7), torch.zeros(1, 8, dtype=torch.int64)
        padded[0, list(places)], mask[0, list(places)] = tokens[0], 1
        assert torch.allclose(cached(model, padded, mask, 5)[0, -1], alone, atol=2e-5), places
    ending = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    padded = torch.cat([tokens, torch.full((1, 2), 7)], dim=1)
    assert torch.allclose(model(padded, ending)[0, 5], alone, atol=2e-5)


@torch.no_grad()
def test_logits_come_of_the_places_that_are_asked_for(model: nn.Module) -> None:
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    every = cached(model, tokens, mask)
    found = model(tokens, mask, torch.tensor([[8, 0], [3, 99]]), *empty(model, 2))[0]
    assert torch.equal(found, torch.stack([every[0, [8, 0]], every[1, [3, 8]]]))


@torch.no_grad()
def test_a_place_counts(model: nn.Module) -> None:
    """The same token twice over: without places, all of its logits would be alike."""
    found = model(torch.tensor([[1, 2, 1, 2]]), torch.ones(1, 4, dtype=torch.int64))[0]
    assert not torch.allclose(found[1], found[3], atol=1e-4)


@torch.no_grad()
def test_shared_heads_are_heads_that_are_alike() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 50, "max_tokens": 16, "width": 32, "depth": 1, "heads": 4, "hidden": 64}
    shared, whole = Decoder(**options, kv_heads=2).eval(), Decoder(**options, kv_heads=4).eval()
    state = shared.state_dict()
    for name in ("layers.0.attention.key.weight", "layers.0.attention.value.weight"):
        state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    whole.load_state_dict(state)
    tokens, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    assert torch.allclose(shared(tokens, mask), whole(tokens, mask), atol=1e-6)


@torch.no_grad()
def test_it_is_the_llama_of_transformers() -> None:
    """Rotary positions, RMSNorm, gates and shared heads: the same weights give the same logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = {"vocab_size": 50, "max_tokens": 16, "width": 32, "depth": 2, "heads": 4, "kv_heads": 2}
    own = Decoder(**options, hidden=64, tied=False).eval()
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, rms_norm_eps=1e-6, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    names = {
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.proj": "self_attn.o_proj", "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj", "inner": "mlp.up_proj", "outer": "mlp.down_proj",
    }  # fmt: skip
    state = {"lm_head.weight": own.head.weight, "model.embed_tokens.weight": own.tokens.weight}
    state["model.norm.weight"] = own.norm.weight  # type: ignore[assignment]
    for index, layer in enumerate(own.layers):
        for mine, other in names.items():
            state[f"model.layers.{index}.{other}.weight"] = layer.get_submodule(mine).weight  # type: ignore[assignment]
    theirs.load_state_dict(state)
    tokens, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    assert torch.allclose(own(tokens, mask), theirs(tokens, mask).logits, atol=1e-5)


def test_a_tied_table_is_one_tensor_in_a_package() -> None:
    model = models.build(causal_spec("bmctl:decoder", args=SMALL))
    untied = models.build(causal_spec("bmctl:decoder", args=SMALL | {"tied": False}))
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, untied)]
    assert sizes[1] - sizes[0] == 50 * 32


@pytest.mark.parametrize(
    ("name", "args", "pattern"),
    [
        ("bmctl:decoder", {"width": 33, "heads": 4}, "width: 33 does not give each of 4 heads an even number"),
        ("bmctl:decoder", {"heads": 4, "kv_heads": 3}, "kv_heads: heads, 4, is no multiple of 3"),
        ("bmctl:decoder", {"positions": "absolute"}, "positions: must be"),
        ("bmctl:encoder", {}, "must be told num_classes"),
        ("transformers:bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, "counts the places of tokens itself"),
        ("transformers:vit", {}, "is no causal language model"),
    ],
)
def test_what_cannot_go_on_with_a_text_is_refused(name: str, args: dict[str, Any], pattern: str) -> None:
    with pytest.raises(RecipeError, match=pattern):
        models.build(models.resolve(causal_spec(name, args=args)))


def test_a_decoder_is_no_classifier() -> None:
    with pytest.raises(RecipeError, match="is a language model, and this task needs another"):
        models.build(text_spec("bmctl:decoder", args=SMALL))
