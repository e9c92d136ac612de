"""Missing verdicts: what is said where a judge gave none on some replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd

from mergetune.evaluation.bound_task import UNJUDGED
from mergetune.evaluation.evaluate import ITEM_KEYS


def missing_verdicts(
    measurements: Iterable[tuple[str, pd.DataFrame]], items: Callable[[], pd.DataFrame]
) -> list[str]:
    """Return a warning for each task in which a judge gave no verdict on some replies, with an example.

    Args:
        measurements: what each is called, which may be nothing, and its rows.
        items: returns `Evaluator.items()`, where there is something to warn of.
    """
    n_items: Counter[str] = Counter()
    n_replies: Counter[str] = Counter()
    examples: dict[str, dict[Any, Any]] = {}
    for name, frame in measurements:
        if UNJUDGED not in frame:  # of an earlier version
            continue
        n_items.update(frame["task"])
        for row in frame[frame[UNJUDGED] > 0].assign(of=name).to_dict("records"):
            n_replies[row["task"]] += int(row[UNJUDGED])
            examples.setdefault(row["task"], row)
    if not examples:
        return []
    prompts = items().set_index(ITEM_KEYS)["prompt"]
    found = []
    for task, row in examples.items():
        of = f" of `{row['of']}`" if row["of"] else ""
        prompt = str(prompts[tuple(row[key] for key in ITEM_KEYS)])[:80]
        found.append(
            f"`{task}`: the judge gave no verdict on {n_replies[task]} "
            f"{'reply' if n_replies[task] == 1 else 'replies'} ({n_items[task]:,} items were scored), such "
            f"as that{of} to {prompt!r}. What is said of this task rests on the others."
        )
    return found
