"""Tool calls as text where no chat template writes them: JSON, and Hermes' form."""

from __future__ import annotations

import json
from typing import Any


def call_json(name: Any, arguments: Any, key: str = "arguments") -> str:
    """Return a call as a JSON object of its name and its arguments."""
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def hermes_call(name: Any, arguments: Any) -> str:
    """Return a call as models of Hermes' form write it: its JSON on a line of its own, between two marks."""
    return f"<tool_call>\n{call_json(name, arguments)}\n</tool_call>"


def call_id(number: int) -> str:
    """Return an id for a call that has none: nine letters and digits, as Mistral's chat templates want."""
    return f"call{number:05d}"
