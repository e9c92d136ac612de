"""Schemas of tools: the parameters of each tool of an item, and whether a call is valid by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import ToolCall

Schema = Mapping[str, Any]

_FORM = (
    '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string"}}, "required": ["city"]}}}'
)
# What JSON Schema calls the types of the Berkeley Function-Calling Leaderboard; "": any type.
_JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": ""}


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Schema]:
    """Return the schema of each tool's parameters, by the tool's name.

    Raises:
        ValueError: one of them is no tool, or two have one name.
    """
    schemas: dict[str, Schema] = {}
    for tool in tools:
        function = tool.get("function")
        own = function if isinstance(function, dict) else {}
        name, parameters = own.get("name"), own.get("parameters") or {}
        if not isinstance(name, str) or not _has_parameters(parameters):
            raise ValueError(f"each of `tools` must be an object such as {_FORM}, but one is {tool!s:.80}")
        if name in schemas:
            raise ValueError(f"each of `tools` must have a name of its own, but two are `{name}`")
        schemas[name] = parameters
    return schemas


def check_schemas(schemas: Mapping[str, Schema]) -> None:
    """Check that JSON Schema knows what the schemas say.

    Raises:
        ValueError: one of them is no JSON Schema.
    """
    from jsonschema.exceptions import SchemaError

    for name, schema in schemas.items():
        validator = _validator(schema)
        try:
            validator.check_schema(validator.schema)
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path)) or "its top"
            raise ValueError(
                f"the parameters of the tool `{name}` must be a JSON Schema, but at {where} "
                f"{error.message:.80}"
            ) from error


def is_valid(call: ToolCall, schemas: Mapping[str, Schema]) -> bool:
    """Say whether a call names a tool, and the tool's schema takes its arguments.

    Raises:
        MergetuneError: the schema refers to another that it does not hold; nothing is fetched.
    """
    from referencing.exceptions import Unresolvable

    if call.name not in schemas:
        return False
    try:
        return bool(_validator(schemas[call.name]).is_valid(call.arguments))
    except Unresolvable as error:
        raise MergetuneError(
            f"The parameters of the tool `{call.name}` must hold every schema that they refer to: {error}"
        ) from error


def _has_parameters(schema: Any) -> bool:
    """Say whether what a schema says of parameters can be read: which there are, and which are required."""
    return (
        isinstance(schema, dict)
        and isinstance(schema.get("properties", {}), dict)
        and isinstance(required := schema.get("required", []), list)
        and all(isinstance(each, str) for each in required)
    )


def _validator(schema: Schema) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    plain = _json_schema(schema)
    return validator_for(plain, default=Draft202012Validator)(plain, registry=Registry())


def _json_schema(schema: Any) -> Any:
    """Return a schema with the types of JSON Schema."""
    if isinstance(schema, list):
        return [_json_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    own = {key: _json_schema(value) for key, value in schema.items()}
    if isinstance(own.get("type"), str):
        own["type"] = _JSON_TYPES.get(own["type"], own["type"])
    return {key: value for key, value in own.items() if (key, value) != ("type", "")}
