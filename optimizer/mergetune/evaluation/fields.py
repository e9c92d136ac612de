"""The map of fields (`fields:` of a task): where in a row each field of an item stands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field, model_validator

from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import Strict

MISSING = object()


class FieldMap(Strict):
    """Where each field of an item stands in a row, by dotted paths, such as `gold.text` or `turns.0.content`.

    `choices` is the path of a list, or the paths of each choice; `chosen` and `rejected` are two choices, the
    first of which is right.
    """

    prompt: str | None = None
    messages: str | None = None
    tools: str | None = None
    system: str | None = None
    answer: str | None = None
    choices: str | tuple[str, ...] | None = Field(None, min_length=1)
    patterns: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    id: str | None = None

    @model_validator(mode="after")
    def _is_one_form(self) -> FieldMap:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("must have `prompt` or `messages`, but has both")
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("must have both `chosen` and `rejected`, or neither")
        return self

    @property
    def paths(self) -> dict[str, str | tuple[str, ...]]:
        """The fields that are mapped, and their paths."""
        return self.model_dump(exclude_none=True)

    @property
    def says_the_form(self) -> bool:
        """Whether it names what the model is asked, so that nothing is left to detect."""
        return self.prompt is not None or self.messages is not None

    def applied(self, row: dict[str, Any], own: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a row by the names that a form reads, and what is left of it.

        Args:
            row: as the file has it.
            own: fields of an item that count under their own names, where the map says the form.

        Raises:
            MergetuneError: a path is not in the row; the message names the keys that are there.
        """
        mapped: dict[str, Any] = {}
        rest = dict(row)
        for name, paths in self.paths.items():
            mapped[name] = _taken(row, name, paths)
            for path in [paths] if isinstance(paths, str) else paths:
                rest.pop(path, None)
        if not self.says_the_form:
            return {**rest, **mapped}, {}
        kept = {key: rest.pop(key) for key in own if key in rest}
        return {**kept, **mapped}, rest


def at_path(data: Any, path: str) -> Any:
    """Return what stands at a dotted path, in which a number is an index of a list; else `MISSING`.

    A key that has dots itself is found, too.
    """
    if isinstance(data, dict) and path in data:
        return data[path]
    for part in path.split("."):
        if isinstance(data, dict) and part in data:
            data = data[part]
        elif isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        else:
            return MISSING
    return data


def _taken(row: dict[str, Any], name: str, path: str | tuple[str, ...]) -> Any:
    if not isinstance(path, str):
        return [_taken(row, name, each) for each in path]
    value = at_path(row, path)
    if value is MISSING:
        raise MergetuneError(
            f"`fields.{name}`: must be a path in every row, but `{path}` is not in this one, which has "
            f"{_deepest(row, path)}."
        )
    return value


def _deepest(row: Any, path: str) -> str:
    """Say what is there where a path leads no further."""
    place, found = "", row
    for part in path.split("."):
        if (further := at_path(found, part)) is MISSING:
            break
        place, found = f"{place}.{part}" if place else part, further
    where = f" at `{place}`" if place else ""
    if isinstance(found, dict):
        return f"the keys `{'`, `'.join(found)}`{where}" if found else f"no keys{where}"
    if isinstance(found, list):
        return f"a list of {len(found)}{where}"
    return f"{found!r:.80}{where}"
