"""Tools and tool calls, as the forms of data write them."""

from __future__ import annotations

from typing import Any

from mergetune.evaluation.formats.form import Row, list_at, object_at, refuse


def tools_of(row: Row) -> list[dict[str, Any]]:
    """Return the tools in a row's `tools`, or in `functions`, as chat templates take them."""
    key = "tools" if row.get("tools") is not None else "functions"
    return read_tools(row.get(key), key)


def read_tools(value: Any, path: str) -> list[dict[str, Any]]:
    """Return tools, given as a list or its JSON text, each a function or one in `{"type": "function", …}`."""
    if value is None or value == "":
        return []
    given = [value] if isinstance(value, dict) else list_at(value, path)
    return [_tool(each, f"{path}.{index}") for index, each in enumerate(given)]


def _tool(value: Any, path: str) -> dict[str, Any]:
    tool = object_at(value, path)
    if "function" in tool:
        path, tool = f"{path}.function", object_at(tool["function"], f"{path}.function")
    name, parameters = tool.get("name"), tool.get("parameters")
    if not isinstance(name, str) or not name:
        refuse(f"{path}.name", "must be the name of a function", name)
    if parameters is not None:
        tool = {**tool, "parameters": object_at(parameters, f"{path}.parameters")}
    return {"type": "function", "function": {key: each for key, each in tool.items() if key != "type"}}


def read_calls(value: Any, path: str) -> list[dict[str, Any]]:
    """Return calls: arguments may be objects, as in TRL's format, or JSON text, as in OpenAI's."""
    given = [value] if isinstance(value, dict) else list_at(value, path)
    return [_call(each, f"{path}.{index}") for index, each in enumerate(given)]


def read_call(value: Any, path: str) -> list[dict[str, Any]]:
    """Return the calls in a `function_call`: one, or JSON text of one or several."""
    text = value.lstrip() if isinstance(value, str) else ""
    return read_calls(object_at(value, path) if text.startswith("{") else value, path)


def _call(value: Any, path: str) -> dict[str, Any]:
    call = object_at(value, path)
    inner, own = call.get("function"), path
    if isinstance(inner, dict):
        inner, own = inner, f"{path}.function"
    elif isinstance(inner, str):  # as Inspect writes it
        inner = {**call, "name": inner}
    else:
        inner = call
    name, arguments = inner.get("name"), inner.get("arguments")
    if not isinstance(name, str) or not name:
        refuse(f"{own}.name", "must be the name of a function", name)
    found = {"name": name, "arguments": object_at(arguments, f"{own}.arguments") if arguments else {}}
    if (identity := call.get("id")) is not None:
        found["id"] = (
            identity if isinstance(identity, str) else refuse(f"{path}.id", "must be text", identity)
        )
    return found
