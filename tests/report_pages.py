"""What the report's page holds, read as its script reads it."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any


def unpacked(pack: str) -> Any:
    """Return what a pack holds."""
    return json.loads(zlib.decompress(base64.b64decode(pack), -zlib.MAX_WBITS))
