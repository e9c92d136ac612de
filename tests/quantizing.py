"""The Python of an environment that has llm-compressor, which `make test` sets up, and what rounding does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.weights.quantized import Bits

_OWN = Path(sys.prefix) / "quantizing" / "bin" / "python"
QUANTIZER = str(Path(os.environ.get("QUANTIZER", _OWN)).absolute())
needs_quantizer = pytest.mark.skipif(
    "QUANTIZER" not in os.environ and not _OWN.exists(),
    reason=f"there is no environment with llm-compressor: {_OWN}; `make test` makes it",
)
_IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def error_of(quantized: Path, model: Path, bits: Bits, group_size: int = 0) -> float:
    """Compare a quantized model's logits with those of a plain computation of the same rounding.

    Returns the distance, as a share of what the rounding changes.
    """
    engine = TransformersEngine(EngineConfig(device="cpu"), quantized)
    own = engine.model(_IDS).logits
    engine.close()
    plain, full = (_network(model, rounding)(_IDS).logits for rounding in ((bits, group_size), None))
    return float((own - plain).norm() / (plain - full).norm())


def _network(folder: Path, rounding: tuple[Bits, int] | None) -> Any:
    """Return a model in float32, whose linear layers round if told so."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in model.named_modules():
        if rounding is not None and isinstance(layer, torch.nn.Linear) and name != "lm_head":
            bits, group_size = rounding
            rows = layer.weight.data.reshape(-1, group_size) if bits == "int4" else layer.weight.data
            layer.weight.data = _rounded(rows, bits).reshape(layer.weight.shape)
            if bits != "int4":
                layer.register_forward_pre_hook(lambda _, inputs, bits=bits: (_rounded(inputs[0], bits),))
    return model


def _rounded(values: Tensor, bits: Bits) -> Tensor:
    """Round to the nearest with one scale for each row, (…, n_columns)."""
    largest = values.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    if bits == "fp8":
        scale = largest / 448
        return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale
    n_steps = 255 if bits == "int8" else 15
    scale = 2 * largest / n_steps
    return (values / scale).round().clamp(-(n_steps + 1) // 2, n_steps // 2) * scale
