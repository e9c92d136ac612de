"""Keys and values of a batch of texts: those of their common beginning are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mergetune.engines.batches import common_length

_ROOM = 64  # tokens
_SHORTEST = 8  # a beginning of fewer tokens is not worth a pass of its own


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, with room for the tokens to come, so that not every step copies all."""

    _held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_others: Any) -> Any:
        """Add keys and values, (n_rows, n_heads, n_new, n_dims); return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_before, n_new = self.get_seq_length(), key_states.shape[-2]
        if self._held is None or n_before + n_new > self._held[0].shape[-2]:
            n_held = n_before + n_new + _ROOM
            self._held = (
                _with_room(self.keys, key_states, n_held),
                _with_room(self.values, value_states, n_held),
            )
        after = n_before + n_new
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[..., n_before:after, :] = new
        self.keys, self.values = (held[..., :after, :] for held in self._held)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row so many times."""
        self._held = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._held = None
        super().batch_select_indices(indices)


def cache_of_beginning(
    model: Any, texts: Sequence[Sequence[int]], most: int
) -> tuple[DynamicCache | None, int]:
    """Compute keys and values of what texts begin with alike.

    Args:
        model: of transformers.
        texts: tokens of each.
        most: so many tokens of the beginning at most.

    Returns:
        The cache for these texts, and how many tokens are in it; None where the model has layers whose
        memory is not one key and value for each token.
    """
    cache = _new_cache(model)
    length = min(common_length(texts), most)
    if cache is None or len(texts) == 1 or length < _SHORTEST:
        return cache, 0
    beginning = torch.tensor([texts[0][:length]], device=model.device)
    model.base_model(input_ids=beginning, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(texts))
    return cache, length


def has_cache(model: Any) -> bool:
    """Say whether a model's memory is one key and value for each token, in all its layers."""
    return _new_cache(model) is not None


def joined_caches(model: Any, caches: Sequence[DynamicCache]) -> DynamicCache:
    """Return one cache for the rows of several, whose tokens all end together: the shorter begin later.

    Those given are emptied.
    """
    joined, length = _new_cache(model), max(cache.get_seq_length() for cache in caches)
    assert joined is not None  # there are caches
    layers: list[Any] = joined.layers
    for layer in layers:
        own = [cache.layers.pop(0) for cache in caches]
        layer.update(
            *(_stacked([getattr(each, kind) for each in own], length) for kind in ("keys", "values"))
        )
    return joined


def _stacked(parts: Sequence[Tensor], length: int) -> Tensor:
    """Return the rows of all parts, (n_rows, n_heads, n_tokens, n_dims) each, zeros before the shorter."""
    return torch.cat([pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts])


def _new_cache(model: Any) -> DynamicCache | None:
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    kind: Any = _Layer  # its base has no types
    cache.layers = [kind() for _ in cache.layers]
    return cache


def _with_room(held: Tensor | None, new: Tensor, n_held: int) -> Tensor:
    """Return a tensor for so many tokens, with what is held so far."""
    n_rows, n_heads, _, n_dims = new.shape
    found = new.new_empty(n_rows, n_heads, n_held, n_dims)
    if held is not None and held.numel():
        found[..., : held.shape[-2], :] = held
    return found
