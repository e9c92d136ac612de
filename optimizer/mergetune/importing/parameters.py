"""mergekit's parameters, resolved as mergekit does it: scopes, filters on names, gradients over layers.

A setting is a number or a flag; a list of these, a gradient over the layers of a slice; or a list of
`{filter, value}`, of which the first counts whose filter is part of the tensor's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mergetune.importing.notes import Notes, Place

Value = float | bool
Scope = tuple[Place, Mapping[str, Any]]  # where parameters stand, and they themselves

T = TypeVar("T")
_FLAGS = dict.fromkeys(("true", "yes", "on", "1", "1.0"), True)
_FLAGS |= dict.fromkeys(("false", "no", "off", "0", "0.0"), False)


class _UndecidedError(Exception):
    """Whether the names contain a text is not known."""

    def __init__(self, text: str) -> None:
        self.text = text


@dataclass(frozen=True)
class Names:
    """Tensors' names of which it is known that they contain some texts and lack others."""

    contained: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    def contain(self, text: str) -> bool:
        """Say whether these names contain a text; `by_names` splits them where that is not known."""
        if any(text in known for known in self.contained):
            return True
        if any(known in text for known in self.lacking):
            return False
        raise _UndecidedError(text)

    @property
    def pattern(self) -> str:
        """A regular expression, from the beginning of a name, that holds for these names alone."""
        has = "".join(f"(?=.*{re.escape(text)})" for text in self.contained)
        return has + "".join(f"(?!.*{re.escape(text)})" for text in self.lacking)


def by_names(resolve: Callable[[Names], T], names: Names | None = None) -> list[tuple[Names, T]]:
    """Return what follows from the names of tensors, for as few sets of names as it takes."""
    names = names or Names()
    try:
        return [(names, resolve(names))]
    except _UndecidedError as undecided:
        having = replace(names, contained=(*names.contained, undecided.text))
        lacking = replace(names, lacking=(*names.lacking, undecided.text))
        return [*by_names(resolve, having), *by_names(resolve, lacking)]


def resolve(
    parameter: str, scopes: Iterable[Scope], names: Names, t: float, default: Value | None
) -> Value | None:
    """Return a parameter for tensors of these names, at t ∈ [0, 1] of the depth of their slice.

    The first scope with a value counts; the settings were checked by `check_setting`.
    """
    read = _flag if isinstance(default, bool) else _number
    for _, given in scopes:
        value = _evaluate(given[parameter], names, t, read) if parameter in given else None
        if value is not None:
            return value
    return default


def is_graded(setting: Any) -> bool:
    """Say whether a setting differs from layer to layer."""
    if isinstance(setting, dict):
        return is_graded(setting.get("value"))
    if not isinstance(setting, list):
        return False
    if any(isinstance(each, dict) for each in setting):
        return any(map(is_graded, setting))
    return len(set(map(str, setting))) > 1


def check_setting(notes: Notes, place: Place, is_flag: bool) -> None:
    """Refuse a setting that mergekit does not take, or takes for another than was meant."""
    setting = notes.at(place)
    if isinstance(setting, dict):
        _check_condition(notes, place, is_flag)
    elif isinstance(setting, list):
        kinds = {isinstance(each, dict) for each in setting}
        if len(kinds) > 1:
            notes.refuse(place, "must be a list of values, or of `{filter, value}`, not both.")
        for i in range(len(setting)):
            check_setting(notes, (*place, i), is_flag)
    elif (_flag if is_flag else _number)(setting) is None:
        wanted = "true or false" if is_flag else "a number"
        notes.refuse(place, f"must be {wanted}, a list of these, or a list of `{{filter, value}}`.")


def _check_condition(notes: Notes, place: Place, is_flag: bool) -> None:
    condition = notes.mapping(place, ["value"])
    for key in condition.keys() - {"filter", "value"}:
        notes.refuse(
            (*place, key),
            "mergekit does not read this key and would give the value to all tensors. Say `filter: …`, a "
            "part of the tensors' names, or leave the line out.",
        )
    if not isinstance(condition.get("filter", ""), str | None):
        notes.refuse((*place, "filter"), "must be text: a part of the tensors' names.")
    if isinstance(condition.get("value"), dict):
        notes.refuse((*place, "value"), "must be a value or a list of values.")
    elif condition.get("value") is not None:
        check_setting(notes, (*place, "value"), is_flag)


def _evaluate(setting: Any, names: Names, t: float, read: Callable[[Any], Value | None]) -> Value | None:
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return read(setting)
    if any(isinstance(each, dict) for each in setting):
        chosen = next((each for each in setting if _holds(each.get("filter"), names)), None)
        return None if chosen is None else _evaluate(chosen["value"], names, t, read)
    values = [value for value in map(read, setting) if value is not None]
    return _interpolate(values, t) if values else None


def _holds(text: str | None, names: Names) -> bool:
    return text in (None, "", "*") or names.contain(str(text))


def _interpolate(values: Sequence[Value], t: float) -> Value:
    """Return the value at t of a gradient; flags change in steps."""
    scaled = t * (len(values) - 1)
    first = int(scaled)
    if any(isinstance(value, bool) for value in values):
        return values[first]
    second = min(len(values) - 1, first + 1)
    share = scaled - first
    return (1 - share) * values[first] + share * values[second]


def _number(value: Any) -> float | None:
    """Return a number, also one that YAML reads as text (`1e-4`); None where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _flag(value: Any) -> bool | None:
    """Return a flag, also where it is given as a number (`1.0`) or as text; None where it is none."""
    return _FLAGS.get(str(value).lower())
