"""Scorers of JSONL items: pure functions from a reply and an item to a score in [0, 1]."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from optimizer.yaml_io import Regex, Strict

# Raise it where a reply may get another score than before: measurements name the rules they were made by.
SCORERS_VERSION = 2

ScorerKind = Literal["exact", "contains", "regex", "json", "choice"]


class Scorer(Strict):
    """How the replies of one task are scored.

    `exact`: the reply is the answer; `contains`: the answer (or each of a list of answers) stands in
    the reply; `regex`: the share of the patterns found, those given here and the item's own `patterns`;
    `json`: the reply parses to the answer (key order free); `choice`: the likeliest choice is the
    answer, by log-likelihood, or by log-likelihood per character with `per_character`.
    """

    kind: ScorerKind
    patterns: tuple[Regex, ...] = ()
    ignore_case: bool = False
    per_character: bool = False

    @model_validator(mode="after")
    def _options_fit(self) -> Scorer:
        if self.patterns and self.kind != "regex":
            raise ValueError(f"`patterns` belongs to the scorer `regex`, not to `{self.kind}`")
        if self.per_character and self.kind != "choice":
            raise ValueError(f"`per_character` belongs to the scorer `choice`, not to `{self.kind}`")
        return self

    def score(self, reply: str, answer: Any, patterns: Sequence[str] = ()) -> float:
        """Score one reply; `patterns` are the item's own. Not for `choice`, which lm-eval scores."""
        match self.kind:
            case "exact":
                return float(self._fold(reply) == self._fold(str(answer)))
            case "contains":
                wanted = answer if isinstance(answer, list) else [answer]
                return float(all(self._fold(str(part)) in self._fold(reply) for part in wanted))
            case "regex":
                flags = re.IGNORECASE if self.ignore_case else 0
                every = [*self.patterns, *patterns]
                return sum(re.search(pattern, reply, flags) is not None for pattern in every) / len(every)
            case "json":
                return float(json_equal(parse_json(reply), answer))
            case "choice":
                raise ValueError("`choice` is scored from log-likelihoods, not from a reply.")

    def _fold(self, text: str) -> str:
        stripped = text.strip()
        return stripped.casefold() if self.ignore_case else stripped


_NOT_JSON = object()


def parse_json(reply: str) -> object:
    """Parse a reply that is one JSON value (a Markdown code fence around it is taken off)."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", reply, re.DOTALL)
    try:
        return json.loads(fenced.group(1) if fenced else reply)
    except (ValueError, RecursionError):  # ValueError also of a number of more digits than Python reads
        return _NOT_JSON


def json_equal(first: Any, second: Any) -> bool:
    """Compare parsed JSON: key order is free, 1 equals 1.0, but `true` is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(json_equal(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(json_equal, first, second))
    return bool(first == second)
