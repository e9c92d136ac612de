"""Files of replies by item: those that a judge compares with, and those that people gave labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ConfigDict, Field, model_validator

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.rows import read_rows
from mergetune.files.yaml_io import Strict, validate


class ReplyRow(Strict):
    """A reply to an item, which is named by its `id` or else by its `prompt`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str | int | None = None
    prompt: str | None = None
    reply: str

    @model_validator(mode="after")
    def _names_an_item(self) -> ReplyRow:
        if self.id is None and self.prompt is None:
            raise ValueError("a reply must have the `id` or the `prompt` of its item")
        return self

    @property
    def key(self) -> tuple[str, str]:
        """What it names its item by."""
        return ("id", str(self.id)) if self.id is not None else ("prompt", str(self.prompt))


class LabelRow(ReplyRow):
    """A reply with a person's label."""

    label: float


class LabelledReply(Strict):
    """An item, a reply to it, and the score that a person gave that."""

    item: Item
    reply: str
    score: float = Field(ge=0, le=1)


Row = TypeVar("Row", bound=ReplyRow)


class ByItem(Generic[Row]):
    """Rows by the items that they name; an item's id is that in its metadata."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self._rows.setdefault(row.key, []).append(row)

    def of(self, item: Item) -> list[Row]:
        """Return an item's rows."""
        return [row for key in _keys(item) for row in self._rows.get(key, ())]


def read_references(path: Path, items: Sequence[Item]) -> tuple[ReplyRow, ...]:
    """Read the reply that each item's replies are compared with.

    Raises:
        MergetuneError: the file cannot be read, or does not have one reply for each item.
    """
    rows = [row for _, row in _read(path, ReplyRow)]
    by_item = ByItem(rows)
    for item in items:
        if (count := len(by_item.of(item))) != 1:
            raise MergetuneError(
                f"{path}: must have one reply for each item, but has {count} for {item.prompt[:80]!r}. "
                "A line is an object with `reply`, and with the item's `id` or `prompt`."
            )
    return tuple(rows)


def read_labels(path: Path, items: Sequence[Item], ends: tuple[float, float]) -> tuple[LabelledReply, ...]:
    """Read replies that people gave labels, between the `ends` that stand for the scores 0 and 1.

    Raises:
        MergetuneError: the file cannot be read, a label lies outside, or a row names no item.
    """
    named = {key: item for item in items for key in _keys(item)}
    low, high = ends
    found = []
    for place, row in _read(path, LabelRow):
        if row.key not in named:
            raise MergetuneError(
                f"{place}: must name an item of the task, but there is none with {_named(row)}."
            )
        if not low <= row.label <= high:
            raise MergetuneError(f"{place}: `label` must be from {low:g} to {high:g}, but is {row.label:g}.")
        score = (row.label - low) / (high - low)
        found.append(LabelledReply(item=named[row.key], reply=row.reply, score=score))
    if not found:
        raise MergetuneError(f"{path}: must hold labelled replies, but is empty.")
    return tuple(found)


def _read(path: Path, kind: type[Row]) -> list[tuple[str, Row]]:
    return [(place, validate(data, kind, place)) for place, data in read_rows(str(path), Path())]


def _keys(item: Item) -> list[tuple[str, str]]:
    own = item.metadata.get("id") if isinstance(item.metadata, dict) else None
    return [*([("id", str(own))] if own is not None else []), ("prompt", item.prompt)]


def _named(row: ReplyRow) -> str:
    kind, text = row.key
    return f"the {kind} {text[:80]!r}"
