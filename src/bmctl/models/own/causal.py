"""What causal language models of any library share: who sees whom, where a token stands, and which logits are wanted.

N: texts. P: tokens in the cache. T: tokens after them. S = P + T. G: places that logits are asked for. D: width.
K: heads of keys and values. d: numbers of a head. V: size of the vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

HIDDEN = -1e4
"""What is added to scores that must not count: finite, and within fp16."""


def in_order(ids_NT: torch.Tensor) -> torch.Tensor:
    """int64 [1, T]: places of whole texts, padded at their end."""
    return torch.arange(ids_NT.shape[1], device=ids_NT.device)[None]


def places_of(mask_NS: torch.Tensor, num_past: int, *, most: int) -> torch.Tensor:
    """int64 [N, T], below `most`: how many tokens of its text come before each; padding does not count."""
    counted_NS = mask_NS.float().cumsum(1) - 1  # engines add up floats alone
    return counted_NS[:, num_past:].clamp(0, most - 1).long()


def bias_of(mask_NS: torch.Tensor, num_new: int, num_past: int) -> torch.Tensor:
    """float32 [N, 1, T, S]: 0 where a token may look, HIDDEN where there is padding or what comes later."""
    keys_S = torch.arange(num_past + num_new, device=mask_NS.device)
    queries_T = torch.arange(num_new, device=mask_NS.device) + num_past
    is_seen_NTS = (keys_S[None, None, :] <= queries_T[None, :, None]) & (mask_NS != 0)[:, None, :]
    return (~is_seen_NTS)[:, None].float() * HIDDEN


def chosen(x_NTD: torch.Tensor, at_NG: torch.Tensor) -> torch.Tensor:
    """[N, G, D]: the rows at these places; beyond the last one, the last one."""
    at_NG1 = at_NG.clamp(max=x_NTD.shape[1] - 1)[..., None]
    return x_NTD.gather(1, at_NG1.expand(-1, -1, x_NTD.shape[2]))


# -- models of transformers -------------------------------------------------------------------------


class OtherKindError(Exception):
    """A model that cannot be called as a decoder with a cache; the message goes on from its name."""


class CausalLogits(nn.Module):
    """A causal language model of transformers, called as `decoder.Decoder` is.

    Args:
        model: Takes ids, a mask [N, 1, T, S] that is added, places and a cache.
        cache: Of each layer K and d.
        max_tokens: Largest S.
    """

    def __init__(self, model: nn.Module, *, cache: tuple[tuple[int, int], ...], max_tokens: int) -> None:
        super().__init__()
        self.model, self.cache, self.max_tokens = model, cache, max_tokens
        self._takes_cache_as = _name_of_cache(model)

    def forward(
        self, ids_NT: torch.Tensor, mask_NS: torch.Tensor, at_NG: torch.Tensor | None = None, *past: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """As `decoder.Decoder.forward`; logits are computed of all places, and those asked for are taken."""
        from transformers import DynamicCache

        num_past = past[0].shape[2] if past else 0
        places_NT = places_of(mask_NS, num_past, most=self.max_tokens) if past else in_order(ids_NT)
        kept = DynamicCache(list(zip(past[::2], past[1::2], strict=True))) if past else None
        found = self.model(
            input_ids=ids_NT,
            attention_mask=bias_of(mask_NS, ids_NT.shape[1], num_past),
            position_ids=places_NT,
            use_cache=kept is not None,
            **{self._takes_cache_as: kept},
        )
        if at_NG is None or kept is None:
            logits: torch.Tensor = found.logits
            return logits
        return chosen(found.logits, at_NG), *(each for layer in kept.layers for each in (layer.keys, layer.values))


def _name_of_cache(model: Any) -> str:
    """Which argument: transformers has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def wrapped(model: Any, *, max_tokens: int) -> CausalLogits:
    """The model as a decoder; what it keeps of a token is found by running it.

    Raises:
        OtherKindError: It takes no places, or keeps something else than keys and values.
    """
    from transformers import DynamicCache

    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise OtherKindError("counts the places of tokens itself, which a padded cache does not allow")
    training = model.training
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.int64)
            kept = DynamicCache([])
            model.eval()(
                input_ids=ids,
                attention_mask=torch.zeros(1, 1, 1, 1),
                position_ids=ids,
                use_cache=True,
                **{_name_of_cache(model): kept},
            )
        cache = tuple((layer.keys.shape[1], layer.keys.shape[3]) for layer in kept.layers)
        if not cache or any(layer.keys.shape != layer.values.shape for layer in kept.layers):
            raise OtherKindError("keeps keys and values of different shapes")
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise OtherKindError(f"keeps something else than keys and values ({error})") from error
    return CausalLogits(model.train(training), cache=cache, max_tokens=max_tokens)
