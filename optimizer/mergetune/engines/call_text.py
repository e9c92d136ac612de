"""Tool calls where no chat template writes them: JSON, Hermes' form, and messages in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message in OpenAI's format: each of its calls has an id, and its arguments are JSON text."""
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {**call, "id": call.get("id", call_id(number)), "function": _with_text(call["function"])}
        for number, call in enumerate(message["tool_calls"])
    ]
    return {**message, "tool_calls": calls}


def _with_text(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
