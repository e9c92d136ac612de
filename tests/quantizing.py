"""The Python of an environment that has llm-compressor; `make test` sets it up."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_OWN = Path(sys.prefix) / "quantizing" / "bin" / "python"
QUANTIZER = os.environ.get("QUANTIZER", str(_OWN))
needs_quantizer = pytest.mark.skipif(
    "QUANTIZER" not in os.environ and not _OWN.exists(),
    reason=f"there is no environment with llm-compressor: {_OWN}; `make test` makes it",
)
