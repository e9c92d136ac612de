"""The items behind the scores, packed for the page: asked, replied and judged, loaded when it is opened.

A pack is JSON, compressed (raw deflate) and in base64: the browser's own `DecompressionStream` opens it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mergetune.evaluation.evaluate import ITEM_KEYS
from mergetune.evaluation.suite import Split
from mergetune.results.run_dir import RunDir

_LONGEST = (4000, 2000, 1000, 500, 250, 120)  # characters kept of a text: the first that fits
_TEXT_BYTES = 500_000  # of what was asked, in a split
_REPLY_BYTES, _REPLY_BYTES_EACH = 1_500_000, 250_000  # of replies and reasons: in all, of one candidate


@dataclass(frozen=True)
class ItemDetails:
    """Packs by name.

    `items.SPLIT` has the items, `scores.SPLIT` their scores by candidate, in the order of the items, and
    `replies.SPLIT.NAME` what one candidate replied and, where a judge scored, its reasons. Replies are kept
    of as many as fit, those first that are looked at first; 0 in place of a text says that it is that of the
    candidate named `first`. Where all would take too much room, those that scored as the first candidate's
    are null, and long ones are cut.
    """

    packs: Mapping[str, str]
    n_replies_left_out: int  # candidates whose replies did not fit


def packed(value: Any) -> str:
    """Write a value as a pack."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return base64.b64encode(deflate.compress(text.encode()) + deflate.flush()).decode()


def item_details(run: RunDir, wanted: Mapping[Split, Sequence[str]]) -> ItemDetails:
    """Pack the items of a run.

    Args:
        run: the run directory.
        wanted: the candidates measured on each split, those looked at first before the others.
    """
    packs: dict[str, str] = {}
    left, n_left_out = _REPLY_BYTES, 0
    for split, names in wanted.items():
        if not names:
            continue
        items = _items(run, split)
        index = pd.MultiIndex.from_frame(items[ITEM_KEYS])
        packs[f"items.{split}"] = _fitting(items)
        scores: dict[str, list[float | None]] = {}
        first = _Replies("", [], [], [])
        for name in names:
            rows = _rows(run, name, split, index)
            texts = rows[["response", "reason"]].fillna("")
            own = _Replies(name, texts["response"].tolist(), texts["reason"].tolist(), rows["score"].tolist())
            scores[name] = [None if pd.isna(one) else round(one, 4) for one in own.scores]
            pack = next((p for p in _packs(own, first) if len(p) <= min(left, _REPLY_BYTES_EACH)), None)
            if pack is None:
                n_left_out += 1
                continue
            packs[f"replies.{split}.{name}"] = pack
            left -= len(pack)
            first = first if first.name else own
        packs[f"scores.{split}"] = packed(scores)
    return ItemDetails(packs, n_left_out)


@dataclass(frozen=True)
class _Replies:
    """What a candidate replied to the items, what a judge wrote of that, and its scores."""

    name: str
    texts: list[str]
    reasons: list[str]
    scores: list[float]


def _packs(own: _Replies, first: _Replies) -> Iterator[str]:
    """Yield packs of a candidate's replies, the fullest first; see `ItemDetails`."""
    for longest in _LONGEST[1:]:
        texts = {"replies": _told(own.texts, first.texts, longest)}
        if any(own.reasons):
            texts["reasons"] = _told(own.reasons, first.reasons, longest)
        if not first.name or longest == _LONGEST[1]:
            yield packed({"first": first.name, **texts})
        if first.name:
            alike = [mine == other for mine, other in zip(own.scores, first.scores, strict=True)]
            kept = {
                key: [
                    None if is_alike and text else text for is_alike, text in zip(alike, given, strict=True)
                ]
                for key, given in texts.items()
            }
            yield packed({"first": first.name, **kept})


def _told(own: Sequence[str], first: Sequence[str], longest: int) -> list[str | int | None]:
    """Return texts as a pack has them: cut where too long, and 0 where the first candidate's is the same."""
    same = [mine == other for mine, other in zip(own, first, strict=True)] if first else [False] * len(own)
    return [0 if is_same else _cut(text, longest) for is_same, text in zip(same, own, strict=True)]


def _items(run: RunDir, split: Split) -> pd.DataFrame:
    items, sent = run.items(), run.sent()
    items = items[items["split"] == split]
    if sent is not None:
        items = items.merge(sent, on=ITEM_KEYS, how="left", validate="one_to_one")
    return items.reindex(columns=[*ITEM_KEYS, "prompt", "target", "sent"]).fillna("")


def _rows(run: RunDir, name: str, split: Split, index: pd.MultiIndex) -> pd.DataFrame:
    frame = run.measurement(name, split)
    if frame is None:
        raise ValueError(f"`{name}` was not measured on the {split} split.")
    return frame.set_index(ITEM_KEYS).reindex(index, columns=["score", "response", "reason"])


def _fitting(items: pd.DataFrame) -> str:
    """Pack the items with texts as long as fits."""
    for longest in _LONGEST:
        rows = [
            [score, str(item), *(_cut(str(text), longest) for text in texts)]
            for score, _, item, *texts in items.itertuples(index=False, name=None)
        ]
        pack = packed(rows)
        if len(pack) <= _TEXT_BYTES:
            break
    return pack


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … (cut off here)"
