"""Files of items: what a file was taken for, and its items."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.fields import FieldMap
from mergetune.evaluation.formats import BFCL, COMMON, Form, fields_of, form_of, suggestion
from mergetune.evaluation.items import Item, Turns
from mergetune.evaluation.rows import PlacedRow, Row, located, read_rows
from mergetune.evaluation.scorers.scorer import BaseScorer
from mergetune.files.yaml_io import validate

_FOR_ALL: dict[str, Any] = {"none": [], "any": {"call": "any"}}  # of `answers`: one for all items
_SHOWN = 10  # rows that an error names, at most
_ANSWER_KEYS = ("ground_truth", "answer")  # of a file of answers


@dataclass(frozen=True)
class ItemSource:
    """Where items come from, and how they are read.

    Attributes:
        file: a path relative to a folder, or `hf:owner/name`.
        fields: where in a row the fields of an item stand; empty: as the form has them.
        answers: a second file, joined by `id`; `none`: no tool is to be called; `any`: one is, whichever.
        split: of a data set.
        config_name: of a data set on the Hub.
        skip: rows to leave out, by the line or row that errors name.
    """

    file: str
    fields: FieldMap = field(default_factory=FieldMap)
    answers: str | None = None
    split: str | None = None
    config_name: str | None = None
    skip: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """What its items are known by: the file, and all that distinguishes them from others of that file."""
        said: dict[str, Any] = {"config_name": self.config_name, "split": self.split, "answers": self.answers}
        said["skip"] = ", ".join(map(str, self.skip)) or None
        options = [
            f"{key}: {value}" for key, value in {**said, **self.fields.paths}.items() if value is not None
        ]
        return f"{self.file} ({', '.join(options)})" if options else self.file


@dataclass(frozen=True)
class ItemFile:
    """Items as they were read.

    Attributes:
        source: where they come from.
        form: what the file was taken for, in words.
        is_conversation: whether its form may have several turns.
        items: in the file's order.
        places: where each item stands, for errors.
        hint: what may help where an item has no answer.
    """

    source: ItemSource
    form: str
    is_conversation: bool
    items: tuple[Item, ...]
    places: tuple[str, ...]
    hint: str = ""

    @property
    def summary(self) -> str:
        """Say how many items there are, and what the file was taken for."""
        return f"{self.source.file}: {len(self.items)} items, taken for {self.form}"

    def check(
        self,
        scorer: BaseScorer,
        stop: Sequence[str] = (),
        *,
        which_turns: Turns = "last",
        is_example: bool = False,
    ) -> None:
        """Check every item for a scorer: see `check_item`.

        Raises:
            MergetuneError: it cannot take some; the message says why of the first, and names the others.
        """
        problems = {
            place: problem
            for item, place in zip(self.items, self.places, strict=True)
            if (problem := self._problem(item, scorer, stop, which_turns, is_example)) is not None
        }
        if not problems:
            return
        (place, problem), *others = problems.items()
        further = _further([_number(other) for other, _ in others]) if len(problems) < len(self.items) else ""
        raise MergetuneError(f"{place}{problem}{further}")

    def _problem(
        self, item: Item, scorer: BaseScorer, stop: Sequence[str], which_turns: Turns, is_example: bool
    ) -> str | None:
        """Say why a scorer cannot take an item; None where it can."""
        if not item.prompt and scorer.asks != "likelihoods":
            return (
                f": the scorer `{scorer.kind}` needs a prompt, but there is none. Whole texts are compared "
                "by the scorer `choice`."
            )
        turns = item.turns(which_turns)
        if not turns:
            return f": must have a reply of the kind `score_turns: {which_turns}`, but has none."
        for number, turn in enumerate(turns, start=1):
            if problem := scorer.check_item(turn, stop, is_example=is_example):
                which = f", turn {number} of {len(turns)}" if len(turns) > 1 else ""
                return f"{which}: {problem}{self._hint(turn, which_turns)}"
        return None

    def _hint(self, turn: Item, which_turns: Turns) -> str:
        if turn.answer is None:
            return self.hint
        if which_turns == "all" and turn.wants_calls:
            return " This reply calls tools: `score_turns: text` leaves such replies out."
        return ""


def read_items(source: ItemSource, folder: Path) -> ItemFile:
    """Read a file of items, whatever its form.

    Raises:
        MergetuneError: the file cannot be read, holds no items or is of no known form, or a row is broken;
            the message names the file, the row, the field and what helps.
    """
    with _no_collection():
        return _read_items(source, folder)


def _read_items(source: ItemSource, folder: Path) -> ItemFile:
    rows = _kept(read_rows(source.file, folder, source.split, source.config_name), source)
    if not rows:
        raise MergetuneError(f"{located(source.file, folder)}: holds no items, but at least one is needed.")
    answers = _Answers(source.answers, folder)
    mapped = [_mapped(source.fields, row) for row in rows]
    try:
        form = form_of([row for _, row, _ in mapped])
    except MergetuneError as error:
        raise MergetuneError(f"{rows[0][0]}: {error}") from error
    items = tuple(_item(form, answers, *each) for each in mapped)
    places = tuple(place for place, _ in rows)
    return ItemFile(
        source, _in_words(form, source, items), form.is_conversation, items, places, _hint(form, source, rows)
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage while rows become items: there is none, and looking for it doubles the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _kept(rows: Sequence[PlacedRow], source: ItemSource) -> list[PlacedRow]:
    """Leave out the rows that are to be skipped."""
    by_number = {_number(place): (place, row) for place, row in rows}
    if unknown := [number for number in source.skip if number not in by_number]:
        raise MergetuneError(
            f"{source.file}: `skip` must name rows that are there, but {unknown[0]} is none of {len(rows)}. "
            "Give the numbers that errors name."
        )
    return [each for number, each in by_number.items() if number not in source.skip]


def _number(place: str) -> int:
    """Return the line or row of a place."""
    return int(place.rpartition(" ")[2])


class _Answers:
    """The answers of a second file by `id`, one answer for all items, or neither."""

    def __init__(self, given: str | None, folder: Path) -> None:
        self._given = given
        self._by_id: dict[str, Any] = {}
        for place, row in [] if given in (None, *_FOR_ALL) else read_rows(str(given), folder):
            identity = _identity(row, place)
            key = next((key for key in _ANSWER_KEYS if key in row), None)
            if key is None:
                raise MergetuneError(
                    f"{place}: must have `ground_truth` or `answer`, but has `{'`, `'.join(row)}`."
                )
            if identity in self._by_id:
                raise MergetuneError(f"{place}: `id` must stand once, but `{identity}` stands twice.")
            self._by_id[identity] = row[key]

    def put_into(self, fields: dict[str, Any], row: Row, place: str) -> dict[str, Any]:
        """Return the fields of an item with its answer."""
        if self._given is None:
            return fields
        if any(row.get(key) is not None for key in _ANSWER_KEYS):
            raise MergetuneError(f"{place}: has an answer of its own. Leave the task's `answers` out.")
        if self._given in _FOR_ALL:
            return {**fields, "answer": _FOR_ALL[self._given]}
        identity = _identity(row, place)
        if identity not in self._by_id:
            raise MergetuneError(
                f"{place}: `id` must be one of {self._given}, but `{identity}` is not there."
            )
        return {**fields, "answer": self._by_id[identity]}


def _identity(row: Row, place: str) -> str:
    identity = row.get("id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise MergetuneError(
            f"{place}: `id` must be text or a whole number, to join answers by, but is {identity!r:.80}."
        )
    return str(identity)


def _mapped(fields: FieldMap, placed: PlacedRow) -> tuple[str, Row, Row]:
    """Return a row's place, the row by the names that forms read, and what is left of it."""
    place, row = placed
    try:
        return (place, *fields.applied(row, (*COMMON, "id", "metadata")))
    except MergetuneError as error:
        raise MergetuneError(f"{place}: {error}") from error


def _item(form: Form, answers: _Answers, place: str, row: Row, rest: Row) -> Item:
    try:
        fields = fields_of(form, row)
    except MergetuneError as error:
        raise MergetuneError(f"{place}: {error}") from error
    if fields.get("prompt") == "" and not fields.get("choices"):
        raise MergetuneError(f"{place}: `prompt`: must not be empty where there are no `choices`, but is.")
    fields["metadata"] = {**rest, **fields["metadata"]} or None
    return validate(answers.put_into(fields, row, place), Item, place)


def _in_words(form: Form, source: ItemSource, items: Sequence[Item]) -> str:
    parts = [form.name]
    if source.fields.paths:
        parts.append(f"by `fields` ({', '.join(source.fields.paths)})")
    if any(item.tools for item in items):
        parts.append("with tools")
    if source.answers in _FOR_ALL:
        parts.append(f"with {'no' if source.answers == 'none' else 'any'} call as the answer")
    elif source.answers is not None:
        parts.append(f"with answers from {source.answers}")
    return " ".join(parts)


def _further(rows: Sequence[int]) -> str:
    """Say which further rows cannot be scored."""
    if not rows:
        return ""
    shown = ", ".join(map(str, rows[:_SHOWN])) + (" …" if len(rows) > _SHOWN else "")
    return f" {len(rows)} more cannot be scored either: {shown}. Correct them, or leave them out with `skip`."


def _hint(form: Form, source: ItemSource, rows: Sequence[PlacedRow]) -> str:
    """Say what may help where an item has no answer."""
    if form is BFCL and source.answers is None:
        return (
            " BFCL keeps answers in a second file: say `answers: FILE`; or `answers: none` for no call, "
            "`answers: any` for any."
        )
    said = suggestion(rows[0][1], has_prompt=True)
    is_known = source.fields.answer is not None or "PATH" in said or "answer: answer" in said
    return "" if is_known else f" Say {said} in the task, if that is what is wanted."
