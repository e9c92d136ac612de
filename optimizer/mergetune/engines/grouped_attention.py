"""Attention of one new token per row that reads keys and values once for all heads that share them.

Where there is a mask, transformers first copies them for each head of a group (Ainslie et al. 2023,
section 2.2), in every step and layer. Here the heads of a group take the place of query tokens instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "mergetune_sdpa"


def use_grouped_attention(model: Any) -> None:
    """Let a model of transformers that attends by PyTorch's `sdpa` attend so in decoding."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa_attention_forward` does.

    Args:
        module: the layer's.
        query: (n_rows, n_heads, n_new, n_dims).
        key: (n_rows, n_groups, n_tokens, n_dims).
        value: as `key`.
        attention_mask: (n_rows, 1, n_new, n_tokens).
        dropout: as there.
        scaling: as there.
        others: as there.

    Returns:
        (n_rows, n_new, n_heads, n_dims), and no weights.
    """
    n_rows, n_heads, n_new, n_dims = query.shape
    n_groups = key.shape[1]
    is_simple = attention_mask is not None and attention_mask.shape[1] == 1 and not dropout
    if n_new > 1 or n_groups == n_heads or not is_simple or others.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    assert attention_mask is not None  # `is_simple`
    heads = query.reshape(n_rows, n_groups, n_heads // n_groups, n_dims)
    mask = attention_mask.expand(-1, -1, n_heads // n_groups, -1)
    found = scaled_dot_product_attention(heads, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(n_rows, 1, n_heads, value.shape[-1]), None
