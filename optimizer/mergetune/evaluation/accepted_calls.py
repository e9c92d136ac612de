"""Accepted tool calls: which calls an answer wants, and how right a call is.

Values are compared as the Berkeley Function-Calling Leaderboard does (BFCL: `ast_checker` of bfcl-eval
2026.3.23), whose schemas have the types `dict`, `float`, `tuple` and `any` beside those of JSON Schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergetune.evaluation.call_formats import call_of, is_call
from mergetune.evaluation.items import ToolCall, json_equal
from mergetune.evaluation.tool_schemas import Schema

# The kinds of values that a type takes.
_KINDS: dict[str, set[str]] = {
    **{kind: {kind} for kind in ("string", "integer", "boolean", "null", "array", "object")},
    **{"number": {"integer", "float"}, "float": {"integer", "float"}},
    **{"any": {"string"}, "tuple": {"array"}, "dict": {"object"}},
}
_KINDS_IN_ARRAYS = _KINDS | {"float": {"float"}}  # there BFCL takes no integer for a float
_IGNORED = re.compile(r"[ ,./\-_*^]")


@dataclass(frozen=True)
class AcceptedCall:
    """A call that an answer wants.

    Attributes:
        name: the tool's name.
        arguments: the accepted values of each argument; `""` among them: it may be left out. In an accepted
            object, and in one of an accepted list, each value is in turn a list of accepted values.
    """

    name: str
    arguments: Mapping[str, Sequence[Any]]

    def needed(self, schema: Schema) -> set[str]:
        """Return the arguments that may not be left out."""
        wanted = {name for name, values in self.arguments.items() if "" not in values}
        return wanted | set(schema.get("required", ()))

    def takes(self, name: str, value: Any, schema: Schema) -> bool:
        """Say whether a value of an argument is right."""
        declared = schema.get("properties", {}).get(name)
        return declared is not None and _accepts(value, self.arguments.get(name, ()), declared)

    def share_right(self, call: ToolCall, schema: Schema) -> float:
        """Return the share of right arguments, of those given and those needed; 0 for another name."""
        if call.name != self.name:
            return 0.0
        names = self.needed(schema) | call.arguments.keys()
        right = sum(self.takes(name, value, schema) for name, value in call.arguments.items())
        return right / len(names) if names else 1.0

    def first(self, schema: Schema) -> ToolCall:
        """Return the call with the first accepted value of each argument; what has none is left out."""
        needed, known = self.needed(schema), schema.get("properties", {})
        arguments = {
            name: _plain(_first(values))
            for name, values in self.arguments.items()
            if name in needed or (name in known and _values(values))
        }
        return ToolCall(name=self.name, arguments=arguments)

    def shown(self) -> str:
        """Return the call as reports show it: `weather(city="Oslo", unit="C" or nothing)`."""
        arguments = [
            f"{name}={' or '.join(_text(_plain(value)) if value != '' else 'nothing' for value in values)}"
            for name, values in self.arguments.items()
        ]
        return f"{self.name}({', '.join(arguments)})"


def accepted_calls(answer: Sequence[Any]) -> tuple[AcceptedCall, ...]:
    """Return the calls that a list wants: exact ones (`name`, `arguments`), or BFCL's ground truth.

    Raises:
        ValueError: it holds something else.
    """
    return tuple(_accepted_call(each) for each in answer)


def _accepted_call(data: Any) -> AcceptedCall:
    if is_call(data):
        return exactly(call_of(data))
    if isinstance(data, dict) and len(data) == 1:
        ((name, arguments),) = data.items()
        if isinstance(arguments, dict) and all(map(_are_accepted, arguments.values())):
            return AcceptedCall(name, arguments)
    raise ValueError(f"no such call is {_text(data):.80}")


def exactly(call: ToolCall) -> AcceptedCall:
    """Return what accepts one call alone."""
    return AcceptedCall(call.name, {name: [_nested(value)] for name, value in call.arguments.items()})


def _nested(value: Any) -> Any:
    """Return an exact value as accepted ones are written: a list for each value of an object."""
    if isinstance(value, dict):
        return {key: [each] for key, each in value.items()}
    if isinstance(value, list):
        return [_nested(each) if isinstance(each, dict) else each for each in value]
    return value


def _accepts(value: Any, accepted: Sequence[Any], schema: Any) -> bool:
    """Say whether a value is accepted, and of the right type.

    That is the declared one or, where an answer has something else, such as an expression in place of a
    number, that of the accepted values, which are then compared exactly.
    """
    declared, kind = _kinds(schema), _kind(value)
    wanted = {_kind(each) for each in _values(accepted)[:1]}
    if declared and not wanted <= declared:
        return kind in declared | wanted and any(json_equal(value, each) for each in accepted)
    if declared and kind not in declared:
        return False
    if not isinstance(value, list):
        return any(_is_same(value, each) for each in accepted)
    inner = _kinds(schema.get("items"), _KINDS_IN_ARRAYS) if declared else set()
    return any(_has_kinds(value, each, inner) for each in accepted) and any(
        _is_same_list(value, [] if each == "" else each) for each in accepted
    )


def _has_kinds(values: list[Any], accepted: Any, declared: set[str]) -> bool:
    """Say whether all of a list are of the declared kinds, or of that of an accepted list's first value."""
    if not isinstance(accepted, list) or not declared:
        return True
    first = {_kind(each) for each in _values(accepted)[:1]}
    return all(_kind(each) in declared | first for each in values)


def _is_same_list(values: list[Any], accepted: Any) -> bool:
    return (
        isinstance(accepted, list)
        and len(values) == len(accepted)
        and all(_is_same(value, each) for value, each in zip(values, accepted, strict=True))
    )


def _is_same(value: Any, accepted: Any) -> bool:
    """Compare a value with an accepted one: text in its plain form, an object key by key."""
    if not isinstance(accepted, dict):
        return json_equal(_folded(value), _folded(accepted))
    return (
        isinstance(value, dict)
        and all("" in values for key, values in accepted.items() if key not in value)
        and all(
            any(json_equal(_folded(own), _folded(each)) for each in accepted.get(key, ()))
            for key, own in value.items()
        )
    )


def _folded(value: Any) -> Any:
    """Return a text without case, spaces and the punctuation that does not count; all else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _kinds(schema: Any, table: Mapping[str, set[str]] = _KINDS) -> set[str]:
    """Return the kinds of values that a schema declares; none: it has no `type`, or one that is not known."""
    types = schema.get("type") if isinstance(schema, dict) else None
    if types == "number" and schema.get("format") == "float":  # BFCL's `float`, as its items are read
        types = "float"
    found = [table.get(str(each), set()) for each in (types if isinstance(types, list) else [types])]
    return set().union(*found) if all(found) else set()


def _kind(value: Any) -> str:
    if isinstance(value, float):  # `Number` as well
        return "float"
    names = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _values(accepted: Sequence[Any]) -> list[Any]:
    return [each for each in accepted if each != ""]


def _first(accepted: Sequence[Any]) -> Any:
    return next(iter(_values(accepted)), "")


def _plain(accepted: Any) -> Any:
    """Return an accepted value as a call gives it."""
    if isinstance(accepted, dict):
        return {key: _first(values) for key, values in accepted.items() if _values(values)}
    return [_plain(each) for each in accepted] if isinstance(accepted, list) else accepted


def _are_accepted(values: Any) -> bool:
    """Say whether these are accepted values, and such are in the objects among them, too."""
    if not isinstance(values, list):
        return False
    parts = [part for each in values for part in (each if isinstance(each, list) else [each])]
    return all(isinstance(own, list) for part in parts if isinstance(part, dict) for own in part.values())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
