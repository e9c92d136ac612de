"""Scorers of JSONL items: pure functions from a reply and an item to a score in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import regex
from pydantic import AfterValidator, model_validator

from mergetune.errors import MergetuneError
from mergetune.evaluation.answers import ScorerKind, answer_texts, parse_json
from mergetune.files.yaml_io import Strict

# Raise it where a reply may get another score than before: measurements name the rules they were made by.
SCORERS_VERSION = 3

_SECONDS_TO_MATCH = 5.0  # for one pattern in one reply, which takes far less than a millisecond
_NOTHING = {"(?!)", "$^", ".^", "$."}  # what is written for a pattern that matches nothing
_ASSERTION = regex.compile(r"(?<!\[)\^|\$|\\[AZzbBGmMK]|\(\?<?[=!]")


def _check_pattern(pattern: str) -> str:
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    if pattern in _NOTHING:
        raise ValueError("must be a pattern that some reply matches")
    if _matches_everything(pattern):
        raise ValueError("must be a pattern that not every reply matches; `^` and `$` hold it at the ends")
    return pattern


ReplyPattern = Annotated[str, AfterValidator(_check_pattern)]


class Scorer(Strict):
    """How the replies of one task are scored, and what the `answer` of its items may be.

    Space around replies and answers does not count; a number, true or false is its JSON text.

    - `exact`: the reply is the answer, or any of a list of answers.
    - `contains`: the answer, or each of a list of answers, stands in the reply.
    - `regex`: the share of the patterns found in the reply, those given here and the item's own `patterns`;
      an `answer` is a good reply, as examples need it. Patterns are those of the package `regex`.
    - `json`: the reply parses to the answer (key order free), a JSON value, or JSON as text.
    - `choice`: the likeliest choice is the answer, by log-likelihood, or by log-likelihood per character
      with `per_character`. The answer is a choice's index from 0, its text or its letter.
    """

    kind: ScorerKind
    patterns: tuple[ReplyPattern, ...] = ()
    ignore_case: bool = False
    per_character: bool = False

    @model_validator(mode="after")
    def _options_fit(self) -> Scorer:
        if self.patterns and self.kind != "regex":
            raise ValueError(f"`patterns` belongs to the scorer `regex`, not to `{self.kind}`")
        if self.per_character and self.kind != "choice":
            raise ValueError(f"`per_character` belongs to the scorer `choice`, not to `{self.kind}`")
        if self.ignore_case and self.kind in ("json", "choice"):
            raise ValueError(
                f"`ignore_case` belongs to `exact`, `contains` and `regex`, not to `{self.kind}`"
            )
        return self

    def score(self, reply: str, answer: Any, patterns: Sequence[str] = ()) -> float:
        """Score one reply; `patterns` are the item's own. Not for `choice`, which lm-eval scores.

        Raises:
            MergetuneError: a pattern's search in the reply does not come to an end.
        """
        match self.kind:
            case "exact":
                return float(self._fold(reply) in map(self._fold, answer_texts("exact", answer)))
            case "contains":
                wanted = map(self._fold, answer_texts("contains", answer))
                return float(all(part in self._fold(reply) for part in wanted))
            case "regex":
                every = [*self.patterns, *patterns]
                return sum(self._finds(pattern, reply) for pattern in every) / len(every)
            case "json":
                (wanted_text,) = answer_texts("json", answer)
                return float(json_equal(parse_json(reply), parse_json(wanted_text)))
            case "choice":
                raise ValueError("`choice` is scored from log-likelihoods, not from a reply.")

    def _fold(self, text: str) -> str:
        stripped = text.strip()
        return stripped.casefold() if self.ignore_case else stripped

    def _finds(self, pattern: str, reply: str) -> bool:
        flags = regex.IGNORECASE if self.ignore_case else 0
        try:
            return regex.search(pattern, reply, flags, timeout=_SECONDS_TO_MATCH) is not None
        except TimeoutError as error:
            raise MergetuneError(
                f"the pattern {pattern!r} must come to an end, but was still searched for after "
                f"{_SECONDS_TO_MATCH:g} s in the reply {reply[:80]!r} ({len(reply)} characters). Mend the "
                "pattern: what is repeated in it should match a text in one way only, as (a|aa)+ does not."
            ) from error


def json_equal(first: Any, second: Any) -> bool:
    """Compare parsed JSON: key order is free, 1 equals 1.0, but `true` is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(json_equal(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(json_equal, first, second))
    return bool(first == second)


def _matches_everything(pattern: str) -> bool:
    """Say whether a pattern is sure to be found in every text: it takes no character, wherever it is tried.

    What it asserts about the text around, such as `^`, is held against that, but for one end alone.
    """
    body = pattern.removeprefix("^")
    if body == pattern and not pattern.endswith("\\$"):
        body = pattern.removesuffix("$")
    try:
        return _ASSERTION.search(body) is None and regex.search(body, "") is not None
    except regex.error:  # what was taken off belonged to the rest
        return False
