"""Models quantized by the real llm-compressor, held against a plain computation of the same rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import build_llama
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.weight_facts import WeightFacts
from mergetune.errors import MergetuneError
from mergetune.measuring.model_under_test import LocalModel, open_model
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.quantized import Bits, check_quantizer, quantize
from quantizing import QUANTIZER, needs_quantizer

IDS = torch.arange(3, 40)[None]


def rounded(values: Tensor, bits: Bits) -> Tensor:
    """Round to the nearest with one scale for each row, (n_rows, n_columns)."""
    largest = values.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    if bits == "fp8":
        scale = largest / 448
        return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale
    steps = 255 if bits == "int8" else 15
    scale = 2 * largest / steps
    low, high = -(steps + 1) // 2, steps // 2
    return (values / scale).round().clamp(low, high) * scale


def plainly_quantized(folder: Path, bits: Bits, group_size: int) -> Any:
    """Return a model in float32 that computes as a quantized one should."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            groups = layer.weight.data
            if bits == "int4":
                groups = groups.reshape(-1, group_size)
            layer.weight.data = rounded(groups, bits).reshape(layer.weight.shape)
            if bits != "int4":
                layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], bits),))
    return model


@needs_quantizer
@pytest.mark.parametrize(("bits", "group_size"), [("int8", 0), ("int4", 32), ("fp8", 0)])
@torch.no_grad()
def test_a_quantized_model_computes_as_its_rounding_says(tmp_path: Path, bits: Bits, group_size: int) -> None:
    model = build_llama(tmp_path / "model", hidden_size=96, intermediate_size=160, dtype="float32")
    found = quantize(model, tmp_path / "quantized", bits, QUANTIZER)
    assert found.n_layers == 14  # 7 in each of two layers
    assert found.nbytes < found.nbytes_before
    assert (tmp_path / "quantized" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert WeightFacts.read(tmp_path / "quantized", "auto").dtype == "float32"
    engine = TransformersEngine(EngineConfig(device="cpu"), tmp_path / "quantized")
    own = engine.model(IDS).logits
    plain = plainly_quantized(model, bits, group_size)(IDS).logits
    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits
    error = (own - plain).norm() / (plain - full).norm()
    assert error < 0.1  # of what the rounding changes
    engine.close()
    opened = open_model(str(tmp_path / "quantized"))
    assert isinstance(opened, LocalModel)
    assert opened.digest != LocalModel(str(model), model).digest
    with pytest.raises(MergetuneError, match="weights must not be quantized"):
        Checkpoint(tmp_path / "quantized")


def test_what_cannot_be_quantized_is_refused_with_the_reason(tmp_path: Path, tiny_base: Path) -> None:
    narrow = Checkpoint(build_llama(tmp_path / "narrow", hidden_size=48, intermediate_size=80))
    with pytest.raises(MergetuneError, match=r"multiple of 32, but `.*` has (48|80)\. Take `quantize: int8`"):
        check_quantizer("int4", None, narrow)
    with pytest.raises(MergetuneError, match=r"cannot be run \(No such file or directory\)"):
        check_quantizer("int8", str(tmp_path / "python"), narrow)
    with pytest.raises(MergetuneError, match=r"needs llm-compressor, which .* cannot import"):
        check_quantizer("int8", None, Checkpoint(tiny_base))
