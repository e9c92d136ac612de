"""The scorer `json`: the reply parses to the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from mergetune.evaluation.items import Item, json_equal, load_json
from mergetune.evaluation.scorers.scorer import BaseScorer, shown, stop_problem, text_of

NOT_JSON = object()


class JsonScorer(BaseScorer):
    """The reply parses to the answer, a JSON value, or JSON as text; key order is free."""

    needs = "`answer`: a JSON value, or JSON as text"
    scores = (
        "1 if the reply parses to the answer; the order of keys is free, and a Markdown code fence around "
        "the reply does not count"
    )

    kind: Literal["json"] = "json"

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        return [
            float(json_equal(parse_json(reply), parse_json(text_of(item.answer))))
            for item, reply in zip(items, replies, strict=True)
        ]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:
        """See `BaseScorer.check_item`."""
        if problem := self.lacking(item, is_example=is_example):
            return problem
        value = parse_json(text_of(item.answer))
        if value is not NOT_JSON:
            tightest = json.dumps(value, ensure_ascii=False, separators=(",", ":"))  # without any space
            return stop_problem([tightest], stop)
        return (
            f"`answer` must be a JSON value, or JSON as text, but no JSON is {shown(item.answer)}. "
            r'A text that is wanted in JSON has quotes of its own: "\"Paris\"". The scorers for plain text '
            "are `exact` and `contains`."
        )

    def missing_answer(self, is_example: bool) -> str:
        """See `BaseScorer.missing_answer`."""
        return f'{super().missing_answer(is_example)} JSON\'s null as an answer is written "null", in quotes.'


def parse_json(reply: str) -> object:
    """Parse a reply that is one JSON value (a Markdown code fence around it is taken off)."""
    text = reply.strip()
    first, _, rest = text.partition("\n")
    if first.rstrip() in ("```", "```json") and rest.endswith("```"):
        text = rest.removesuffix("```")
    try:
        return load_json(text)
    except (ValueError, RecursionError):
        return NOT_JSON
