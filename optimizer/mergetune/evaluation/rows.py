"""Rows of a file: JSON lines, a JSON array, or a table; each row comes with its place, for errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import load_json
from mergetune.evaluation.tables import csv_rows, data_set_rows, hub_rows, parquet_rows
from mergetune.files.library import placed
from mergetune.files.yaml_io import read_text

Row = dict[str, Any]
PlacedRow = tuple[str, Row]  # "items.jsonl, line 3", and what stands there

_HUB = "hf:"  # how the name of a data set on the Hugging Face Hub begins
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ITEM = '{"prompt": "…", "answer": "…"}'


def read_rows(
    given: str, folder: Path, split: str | None = None, config_name: str | None = None
) -> list[PlacedRow]:
    """Read a file, a folder that `datasets` wrote, or a data set on the Hub (`hf:owner/name`).

    Args:
        given: as the suite names it.
        folder: the folder that relative paths are taken from.
        split: of a data set that has several.
        config_name: of a data set on the Hub that has several.

    Raises:
        MergetuneError: it cannot be read; the message says what it is, where and what to do.
    """
    path = located(given, folder)
    if isinstance(path, str):
        return _placed(path, hub_rows(path.removeprefix(_HUB), split, config_name))
    if config_name is not None:
        raise MergetuneError(f"{path}: `config_name` belongs to data sets on the Hub ({_HUB}owner/name).")
    if path.is_dir():
        return _placed(path, data_set_rows(path, split))
    if split is not None:
        raise MergetuneError(f"{path}: `split` belongs to data sets, but this is a file. Leave it out.")
    if path.suffix in (".csv", ".tsv"):
        return csv_rows(path, _text(path))
    if _begins_with(path, (b"PAR1",)):
        return _placed(path, parquet_rows(path))
    return _json_rows(path, _text(path))


def located(given: str, folder: Path) -> Path | str:
    """Return the place of a file or folder, or what names a data set on the Hub as it is."""
    return given if given.startswith(_HUB) else placed(folder, given)


def load_unicode(text: str) -> Any:
    """Read JSON as `load_json` does, but refuse half characters.

    Raises:
        ValueError: it is no JSON.
        RecursionError: it is nested too deep.
    """
    value = load_json(text)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("half a character, such as \\ud83d, stands alone in it") from error
    return value


def _placed(source: str | Path, rows: list[Row]) -> list[PlacedRow]:
    return [(f"{source}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _begins_with(path: Path, beginnings: tuple[bytes, ...]) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(beginnings)
    except OSError as error:
        raise MergetuneError(f"{path}: cannot be read: {error.strerror}.") from error


def _text(path: Path) -> str:
    """Read text in UTF-8 or, as some tools of Windows write it, in UTF-16."""
    if not _begins_with(path, _UTF16):
        return read_text(path)
    try:
        return path.read_text(encoding="utf-16")  # which translates line ends, too
    except UnicodeError as error:
        raise MergetuneError(f"{path}: begins as text in UTF-16, but is none ({error}).") from error


def _json_rows(path: Path, text: str) -> list[PlacedRow]:
    if text.lstrip().startswith("["):
        try:
            values = load_unicode(text)
        except (ValueError, RecursionError) as error:
            raise MergetuneError(f"{path}: is no JSON array: {error}.") from error
        return [_row(value, f"{path}, item {number}") for number, value in enumerate(values, start=1)]
    return [
        _row(_value(line, f"{path}, line {number}", text), f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)  # strings may hold other separators
        if line.strip()
    ]


def _row(value: Any, place: str) -> PlacedRow:
    if isinstance(value, dict):
        return place, value
    shown = json.dumps(value, ensure_ascii=False)
    raise MergetuneError(f"{place}: must be one JSON object, such as {_ITEM}, but is {shown:.80}.")


def _value(line: str, place: str, text: str) -> Any:
    try:
        return load_unicode(line)
    except (ValueError, RecursionError) as error:
        raise MergetuneError(f"{place}: is not JSON: {error}.{_kind_of(text)}") from error


def _kind_of(text: str) -> str:
    """Say what a file may be that is no JSON lines."""
    if not text.lstrip().startswith("{"):
        return (
            f" A file of items has one JSON object a line, such as {_ITEM}, or is a JSON array of them. "
            "A table (CSV) is read where its name ends in .csv or .tsv."
        )
    try:
        load_json(text)
    except (ValueError, RecursionError):
        return ""
    return " The file is one JSON object over several lines: write each item on one line, or all as an array."
