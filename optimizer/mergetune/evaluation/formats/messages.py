"""Messages, as OpenAI, TRL, Inspect and ShareGPT write them, and the conversations that they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.formats.form import Row, list_at, object_at, refuse
from mergetune.evaluation.formats.tools import read_call, read_calls

Message = dict[str, Any]  # the fields of `items.Message`

_ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool"},
}
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(value: Any, path: str) -> list[Message]:
    """Return messages with `role` and `content`, or with `from` and `value` as in ShareGPT's form.

    Raises:
        MergetuneError: a message is broken, or has a part that is no text.
    """
    return [_message(each, f"{path}.{index}") for index, each in enumerate(list_at(value, path))]


def history(messages: Sequence[Message], path: str) -> dict[str, Any]:
    """Return the fields of an item whose messages all stand before the reply."""
    own = list(messages)
    fields: dict[str, Any] = {}
    if own and own[0]["role"] == "system":
        fields["system"] = own.pop(0)["content"]
    asked = [message["content"] for message in own if message["role"] == "user"]
    if not asked or not asked[-1]:
        raise MergetuneError(
            f"`{path}`: must have a message of the user that is not empty before the reply, but has: "
            f"{', '.join(message['role'] for message in messages) or 'none'}."
        )
    if own[-1]["role"] not in ("user", "tool"):
        raise MergetuneError(
            f"`{path}`: must have a message of the user or of a tool before the reply, but has there one of "
            f"the role {own[-1]['role']}: {own[-1]['content']!r:.80}."
        )
    return {**fields, "messages": own, "prompt": asked[-1]}


def conversation(messages: Sequence[Message], path: str) -> dict[str, Any]:
    """Return the fields of an item whose target is the last message, where the assistant wrote it."""
    if not messages or messages[-1]["role"] != "assistant":
        return history(messages, path)
    target = messages[-1]
    if not target["content"] and "tool_calls" not in target:
        raise MergetuneError(f"`{path}.{len(messages) - 1}`: the last reply must not be empty, but is.")
    return {**history(messages[:-1], path), "target": target}


def _message(value: Any, path: str) -> Message:
    data = object_at(value, path)
    role_key = "from" if "from" in data and "role" not in data else "role"
    content_key = "value" if "value" in data and "content" not in data else "content"
    given, content = data.get(role_key), data.get(content_key)
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        refuse(f"{path}.{role_key}", f"must be a role ({', '.join(_ROLES)})", given)
    message: Message = {"role": role}
    if given == "function_call":
        return {**message, "tool_calls": read_call(content, f"{path}.{content_key}"), "content": ""}
    if role == "assistant" and (calls := _calls(data, path)):
        message["tool_calls"] = calls
        content = "" if content is None else content
    message["content"] = _content(content, role, f"{path}.{content_key}")
    for key in ("tool_call_id", "name"):
        if (text := data.get(key)) is not None:
            message[key] = text if isinstance(text, str) else refuse(f"{path}.{key}", "must be text", text)
    return message


def _calls(data: Row, path: str) -> list[dict[str, Any]]:
    if data.get("tool_calls") is not None:
        return read_calls(data["tool_calls"], f"{path}.tool_calls")
    if data.get("function_call") is not None:  # OpenAI's form before tools
        return read_call(data["function_call"], f"{path}.function_call")
    return []


def _content(value: Any, role: str, path: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) or _has_type(each) for each in value):
        return "".join(_part(each, f"{path}.{index}") for index, each in enumerate(value))
    if role == "tool" and value is not None:  # a result that is JSON
        return json.dumps(value, ensure_ascii=False)
    return refuse(path, "must be text, or a list of parts of text", value)


def _has_type(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def _part(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text")
    if part["type"] not in _TEXT_PARTS or not isinstance(text, str):
        raise MergetuneError(
            f"`{path}`: must be a part of the type `text` with its `text`, but is of the type "
            f"`{part['type']}`; pictures, sound and files are not read. Leave this item out."
        )
    return text
