"""Two measurements joined item by item."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import ITEM_KEYS


def pairs(
    first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str], incomplete: Collection[str]
) -> pd.DataFrame:
    """Join two measurements, (score_name, task, item) being the key; the second's columns end in `_baseline`.

    Args:
        first: a row per item.
        second: the same of another model, or of another run.
        names: what the two are called in messages.
        incomplete: scores of which the first may hold fewer items.

    Raises:
        MergetuneError: an item is missing in one of them, or twice in one, or was scored by other rules.
    """
    keys = [pd.MultiIndex.from_frame(frame[ITEM_KEYS]) for frame in (first, second)]
    for name, own in zip(names, keys, strict=True):
        if not own.is_unique:
            twice = "/".join(map(str, own[own.duplicated()][0]))
            raise MergetuneError(f"An item must be measured once, but the {name} has `{twice}` twice.")
    lacking = keys[1].difference(keys[0], sort=False)
    lacking = lacking[~lacking.get_level_values("score_name").isin(list(incomplete))]
    surplus = keys[0].difference(keys[1], sort=False)
    if len(lacking) or len(surplus):
        example = "/".join(map(str, [*lacking, *surplus][0]))
        raise MergetuneError(
            f"Both measurements must be of the same items, but the {names[0]} lacks {len(lacking)} and the "
            f"{names[1]} lacks {len(surplus)}, such as `{example}`: the suite or the split has changed "
            "between them. Measure both again."
        )
    both = first.merge(second, on=ITEM_KEYS, suffixes=("", "_baseline"))
    if "rules_baseline" in both and (differ := both[both["rules"] != both["rules_baseline"]]["task"]).size:
        raise MergetuneError(
            f"Both measurements must be made by the same rules, but the items of `{differ.iloc[0]}` were "
            f"asked or scored otherwise in the {names[0]} than in the {names[1]}: the suite, a task's file "
            "or its code has changed between them. Measure both again."
        )
    return both
