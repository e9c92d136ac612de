"""Models quantized by the real llm-compressor."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import build_llama
from mergetune.engines.weight_facts import WeightFacts
from mergetune.errors import MergetuneError
from mergetune.measuring.model_under_test import LocalModel, open_model
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.quantized import Bits, check_quantizer, quantize
from quantizing import QUANTIZER, error_of, needs_quantizer


@needs_quantizer
@pytest.mark.parametrize(("bits", "group_size"), [("int4", 32), ("fp8", 0)])
def test_a_quantized_model_computes_as_its_rounding_says(tmp_path: Path, bits: Bits, group_size: int) -> None:
    model = build_llama(tmp_path / "model", hidden_size=96, intermediate_size=160)
    folder = tmp_path / "quantized"
    found = quantize(model, folder, bits, QUANTIZER)
    assert found.n_layers == 14  # 7 in each of two layers
    assert found.nbytes < found.nbytes_before
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    facts, full = WeightFacts.read(folder, "auto"), WeightFacts.read(model, "auto")
    assert facts.dtype == full.dtype == "float32"
    assert full.nbytes <= facts.nbytes < 1.1 * full.nbytes  # unpacked, and scales
    assert error_of(folder, model, bits, group_size) < 0.1
    opened = open_model(str(folder))
    assert isinstance(opened, LocalModel)
    assert opened.digest != LocalModel(str(model), model).digest
    with pytest.raises(MergetuneError, match="weights must not be quantized"):
        Checkpoint(folder)


def test_what_cannot_be_quantized_is_refused_with_the_reason(tmp_path: Path, tiny_base: Path) -> None:
    narrow = Checkpoint(build_llama(tmp_path / "narrow", hidden_size=48, intermediate_size=80))
    with pytest.raises(MergetuneError, match=r"multiple of 32, but `.*` has (48|80)\. Take `quantize: int8`"):
        check_quantizer("int4", None, narrow)
    with pytest.raises(MergetuneError, match=r"cannot be run \(No such file or directory\)"):
        check_quantizer("int8", str(tmp_path / "python"), narrow)
    with pytest.raises(MergetuneError, match=r"needs llm-compressor, which .* cannot import"):
        check_quantizer("int8", None, Checkpoint(tiny_base))
