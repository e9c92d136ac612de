"""What an import says, line by line: what became of a setting, and what cannot be taken over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import Document

Place = tuple[str | int, ...]  # keys and indices from the top of a document
_LONGEST_VALUE = 60  # characters


@dataclass(frozen=True)
class Remark:
    """What became of a setting; `value` is empty where the key is not there, or has keys of its own below."""

    line: int
    key: str
    value: str
    text: str

    def __str__(self) -> str:
        shown = f"{self.key}: {self.value}" if self.value else self.key
        return f"line {self.line}: `{shown}`: {self.text}"


class Notes:
    """Remarks on a document, and what of it has no counterpart."""

    def __init__(self, file: Path, document: Document) -> None:
        self.file = file
        self.document = document
        self._remarks: list[Remark] = []
        self._refused: list[Remark] = []

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """The remarks in the order of their lines."""
        return tuple(sorted(dict.fromkeys(self._remarks), key=lambda remark: remark.line))

    def remark(self, place: Place, text: str) -> None:
        """Say what became of a setting."""
        self._remarks.append(self._at(place, text))

    def refuse(self, place: Place, text: str) -> None:
        """Keep what cannot be taken over: the rule and the remedy; `settle` raises it."""
        self._refused.append(self._at(place, text))

    def settle(self) -> None:
        """Raise `MergetuneError` if anything was refused, with a line for each."""
        if self._refused:
            lines = sorted(dict.fromkeys(self._refused), key=lambda refused: refused.line)
            raise MergetuneError(f"{self.file}: cannot be taken over:" + "".join(f"\n  {x}" for x in lines))

    def mapping(self, place: Place, needed: Collection[str] = ()) -> Mapping[str, Any]:
        """Return the mapping at a place, empty where nothing is there; refuse what is none."""
        found = self.at(place)
        if found is not None and not isinstance(found, dict):
            self.refuse(place, "must be `key: value` pairs.")
        pairs: Mapping[str, Any] = found if isinstance(found, dict) else {}
        for key in needed:
            if pairs.get(key) is None:
                self.refuse((*place, key), "is required, but missing.")
        return pairs

    def entries(self, place: Place) -> list[Place]:
        """Return the places of a list's entries; refuse what is no list, or is empty."""
        found = self.at(place)
        if not isinstance(found, list) or not found:
            self.refuse(place, "must be a list with at least one entry.")
            return []
        return [(*place, i) for i in range(len(found))]

    def at(self, place: Place) -> Any:
        """Return what stands at a place, None where nothing does."""
        found: Any = self.document.data
        for part in place:
            is_entry = isinstance(found, list) and part in range(len(found))
            found = found[part] if is_entry or (isinstance(found, dict) and part in found) else None
        return found

    def _at(self, place: Place, text: str) -> Remark:
        value = self.at(place)
        parts = value if isinstance(value, list) else [value]
        has_parts = any(isinstance(part, dict) for part in parts)
        shown = "" if value is None or has_parts else _in_one_line(value)
        return Remark(self.document.line(place), ".".join(map(str, place)), shown, text)


def _in_one_line(value: Any) -> str:
    if isinstance(value, str):
        text = " ".join(value.split())
    else:
        text = yaml.safe_dump(
            value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False
        )
        text = text.removesuffix("...\n").strip()
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"
