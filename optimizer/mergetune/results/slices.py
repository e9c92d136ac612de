"""Slices: a suite's items told apart by what their metadata say, such as language or customer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from mergetune.evaluation.evaluate import ITEM_KEYS


@dataclass(frozen=True)
class Slice:
    """The items that have one value of a key; `items` holds what names them."""

    key: str
    value: str
    items: pd.DataFrame

    @property
    def name(self) -> str:
        """How it is called."""
        return f"{self.key}: {self.value}"

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of a measurement that belong to it, in their order."""
        return rows.merge(self.items, on=ITEM_KEYS, how="inner", validate="one_to_one")


def slices_of(items: pd.DataFrame, keys: Sequence[str]) -> Iterator[Slice]:
    """Yield the slices of a suite's items, key by key, the largest first.

    Args:
        items: `Evaluator.items()`.
        keys: the suite's `slices`.
    """
    if "slices" not in items:  # of a run that was begun before there were any
        return
    values = [json.loads(each) for each in items["slices"]]
    for key in keys:
        own = pd.Series([each.get(key) for each in values], index=items.index)
        for value in own.value_counts().index:  # those without a value are in no slice
            yield Slice(key, str(value), items.loc[own == value, ITEM_KEYS])
