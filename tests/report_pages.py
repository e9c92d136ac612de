"""What the report's page holds, read as its script reads it."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any


def packs_of(page: Path) -> dict[str, str]:
    """Return the packs that a page carries, by name."""
    text = page.read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)
    assert block
    found: dict[str, str] = json.loads(block[1])["packs"]
    return found


def unpacked(pack: str) -> Any:
    """Return what a pack holds."""
    return json.loads(zlib.decompress(base64.b64decode(pack), -zlib.MAX_WBITS))
