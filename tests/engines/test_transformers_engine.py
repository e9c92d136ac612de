"""The transformers engine: what it is started on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_cannot_compute_is_refused_by_name(tiny_base: Path, device: str) -> None:
    with pytest.raises(MergetuneError, match=f"The device `{device}` cannot compute here"):
        TransformersEngine(EngineConfig(device=device), tiny_base)
