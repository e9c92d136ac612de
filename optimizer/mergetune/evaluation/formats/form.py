"""What a form of data is, and what all forms share: text, lists and objects with a path for errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mergetune.errors import MergetuneError
from mergetune.evaluation.rows import load_unicode
from mergetune.evaluation.scorers.scorer import shown

Row = Mapping[str, Any]
COMMON = ("tools", "functions", "system", "answer", "choices", "patterns")  # what every form may have beside


@dataclass(frozen=True)
class Form:
    """A form that data come in.

    Attributes:
        name: what a file of it is said to hold.
        keys: the keys of a row that become parts of an item.
        meaning: what becomes of them, for the docs.
        is_like: says whether a row is one of this form.
        fields: returns the fields of a row's item; raises `MergetuneError` where the row is broken.
        is_conversation: whether a row may hold several turns.
    """

    name: str
    keys: tuple[str, ...]
    meaning: str
    is_like: Callable[[Row], bool]
    fields: Callable[[Row], dict[str, Any]]
    is_conversation: bool = False


def has(row: Row, *keys: str) -> bool:
    """Say whether a row has a value at each of these keys."""
    return all(row.get(key) is not None for key in keys)


def refuse(path: str, rule: str, value: Any) -> NoReturn:
    """Raise `MergetuneError` for what stands at a path of a row."""
    raise MergetuneError(
        f"`{path}`: {rule}, but {'is missing or null' if value is None else f'is {shown(value)}'}."
    )


def text_at(row: Row, key: str, within: str = "") -> str:
    """Return the text at a key; `within` is the path of the row itself."""
    value = row.get(key)
    return value if isinstance(value, str) else refuse(f"{within}{key}", "must be text", value)


def list_at(value: Any, path: str) -> list[Any]:
    """Return a list that may be given as JSON text."""
    found = _parsed(value, path)
    return found if isinstance(found, list) else refuse(path, "must be a list, or JSON text of one", value)


def object_at(value: Any, path: str) -> dict[str, Any]:
    """Return an object that may be given as JSON text."""
    found = _parsed(value, path)
    return found if isinstance(found, dict) else refuse(path, "must be an object, or JSON text of one", value)


def _parsed(value: Any, path: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return load_unicode(value)
    except (ValueError, RecursionError) as error:
        raise MergetuneError(f"`{path}`: must be JSON, but is not ({error}): {shown(value)}.") from error
