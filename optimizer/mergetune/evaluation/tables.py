"""Tables as rows: CSV, Parquet, and data sets of the library `datasets`, on disk or on the Hub."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterable
from datetime import date, time
from pathlib import Path
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Number
from mergetune.files.yaml_io import nearest

_DELIMITERS = ",;\t|"


def csv_rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a CSV file's rows and their places, counted as spreadsheets do: the header is row 1.

    Every cell is text as it stands; an empty one is None. The delimiter is the one that the header has most.

    Raises:
        MergetuneError: the header is none, a row has more or fewer cells, or a quote is not closed.
    """
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole conversation
    header_line = text.lstrip("\n").partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header_line.count)
    records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows: list[tuple[str, dict[str, Any]]] = []
    number = 0
    try:
        for number, cells in enumerate(records, start=1):
            if not any(cells):
                continue
            place = f"{path}, row {number}"
            if not header:
                header = _header(cells, place)
            else:
                rows.append((place, _named_cells(header, cells, place)))
    except csv.Error as error:
        raise MergetuneError(
            f"{path}, row {number + 1}: is no row of a CSV file: {error}. A cell that holds a quote or a "
            'line end is put in quotes, and quotes in it are doubled: "say ""hi""".'
        ) from error
    return rows


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names or len(set(names)) < len(names):
        raise MergetuneError(
            f"{place}: the first row of a CSV file must name each column, but is {names!r:.200}."
        )
    return names


def _named_cells(header: list[str], cells: list[str], place: str) -> dict[str, Any]:
    if len(cells) != len(header):
        raise MergetuneError(
            f"{place}: must have a cell for each of the columns {', '.join(header)}, but has {len(cells)}. "
            "Put cells that hold the delimiter in quotes."
        )
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Return a Parquet file's rows; raises `MergetuneError` where it is broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _plain_rows(pq.read_table(path).to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise MergetuneError(f"{path}: must be a Parquet file, but cannot be read: {error}") from error


def data_set_rows(path: Path, split: str | None) -> list[dict[str, Any]]:
    """Return the rows of a folder that `save_to_disk` wrote.

    Raises:
        MergetuneError: it is no such folder, or has no such split; the message names those that it has.
    """
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:  # whatever the library raises at a broken folder
        raise MergetuneError(
            f"{path}: is a folder, and must then be a data set that `save_to_disk` wrote, but: {error}"
        ) from error
    if not isinstance(found, Dataset):
        found = _split_of(found, split, path)
    elif split is not None:
        raise MergetuneError(f"{path}: is a data set without splits. Leave `split: {split}` out.")
    return _data_set_rows(found, path)


def hub_rows(name: str, split: str | None, config_name: str | None) -> list[dict[str, Any]]:
    """Return the rows of a split of a data set on the Hugging Face Hub; no code of its own is run.

    Raises:
        MergetuneError: there is none, no split is named or it has no such one, or the Hub cannot be reached.
    """
    if split is None:
        raise MergetuneError(f"hf:{name}: a data set on the Hub needs `split`, such as `split: test`.")
    from datasets import load_dataset

    try:
        found = load_dataset(name, config_name, split=split)
    except Exception as error:  # whatever the library, the Hub and a file of the data set raise
        raise MergetuneError(
            f"hf:{name}: cannot be loaded: {error} On a machine without the Hub, write it into a folder "
            "elsewhere (`save_to_disk`) and give that."
        ) from error
    return _data_set_rows(found, f"hf:{name}")


def _split_of(found: Any, split: str | None, path: Path) -> Any:
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split is None:
        raise MergetuneError(f"{path}: has the splits {', '.join(found)}. Name one, such as `split: test`.")
    if split not in found:
        raise MergetuneError(f"{path}: has no split `{split}`.{nearest(split, found)}")
    return found[split]


def _data_set_rows(found: Any, source: object) -> list[dict[str, Any]]:
    from datasets import Audio, Image, Video

    media = [name for name, kind in found.features.items() if isinstance(kind, (Audio, Image, Video))]
    try:
        return _plain_rows(found.remove_columns(media).with_format(None))
    except Exception as error:  # whatever decoding a column raises
        raise MergetuneError(f"{source}: cannot be read: {error}") from error


def _plain_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: plain(value) for key, value in row.items()} for row in rows]


def plain(value: Any) -> Any:
    """Return a cell of a typed table as JSON would have it.

    Keys without a value are left out of objects inside it: a typed column gives each object the keys of all.
    Bytes and numbers that are none (NaN) are None.
    """
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return Number(repr(value)) if math.isfinite(value) else None
    if value is None or isinstance(value, bytes):
        return None
    if isinstance(value, (date, time)):
        return value.isoformat()
    return value if isinstance(value, (str, int)) else str(value)
