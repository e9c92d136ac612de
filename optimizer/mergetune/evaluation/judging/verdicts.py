"""Verdicts of a judge: the form that is asked for, and how a judge's reply is read as one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Verdict = dict[str, Any]  # a value by key, and the judge's `reason`


class Explained(NamedTuple):
    """The score of a reply, NaN where there is no verdict, and what the judge wrote, a line a question."""

    score: float
    reason: str


_FENCE = re.compile(r"\s*```\s*\Z")


@dataclass(frozen=True)
class VerdictForm:
    """What a verdict must hold: one of some values for each key.

    Attributes:
        keys: what is judged, each by the same values.
        points: the score that each value stands for, in [0, 1].
        note: what a reader of the reason must know, if anything.
    """

    keys: tuple[str, ...]
    points: Mapping[int | str, float]
    note: str = ""

    @property
    def instruction(self) -> str:
        """Say what to answer with."""
        values = list(self.points)
        if isinstance(values[0], int):
            which = f"a whole number from {values[0]} (worst) to {values[-1]} (best)"
        else:
            which = "one of " + ", ".join(f'"{value}"' for value in values)
        fields = "".join(f', "{key}": …' for key in self.keys)
        return (
            f'Answer with one JSON object and nothing else: {{"reason": "…"{fields}}}. `reason` is a '
            f"sentence or two; {' and '.join(f'`{key}`' for key in self.keys)} must be {which}."
        )

    @property
    def response_format(self) -> dict[str, Any]:
        """Return the form as the option `response_format` of the chat endpoint."""
        values = list(self.points)
        value = {"type": "integer" if isinstance(values[0], int) else "string", "enum": values}
        schema = {
            "type": "object",
            "properties": {"reason": {"type": "string"}, **dict.fromkeys(self.keys, value)},
            "required": ["reason", *self.keys],
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}

    def read(self, reply: str) -> Verdict:
        """Read a judge's reply: one JSON object at its end, with no other before it.

        The first brace must begin the verdict: a reply that quotes what looks like one is not read.

        Raises:
            ValueError: it is no verdict; the message says why.
        """
        text = _FENCE.sub("", _without_thoughts(reply.strip()))
        begin = text.find("{")
        if begin < 0:
            raise ValueError("it holds no JSON object")
        try:
            found = json.loads(text[begin:])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"what begins at its first brace is not one JSON object ({error})") from error
        return {"reason": str(found.get("reason", "")), **{key: self._value(found, key) for key in self.keys}}

    def score(self, verdict: Verdict) -> float:
        """Return the mean of what the values stand for."""
        return sum(self.points[verdict[key]] for key in self.keys) / len(self.keys)

    def text(self, verdict: Verdict) -> str:
        """Return a verdict as people read it: the reason, then what was given."""
        given = ", ".join(f"{key}: {verdict[key]}" for key in self.keys)
        return f"{verdict['reason'].strip()} ({'; '.join(filter(None, [given, self.note]))})".strip()

    def _value(self, found: Verdict, key: str) -> int | str:
        if key not in found:
            raise ValueError(f"`{key}` is missing")
        value = found[key]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or value not in self.points:
            allowed = ", ".join(map(str, self.points))
            raise ValueError(f"`{key}` must be one of {allowed}, but is {json.dumps(value):.80}")
        return value


def _without_thoughts(text: str) -> str:
    """Leave out what a model thought before it replied; the tag that begins it may be the template's."""
    if text.startswith("{"):
        return text
    thoughts, end, rest = text.partition("</think>")
    if not end and thoughts.startswith("<think>"):
        raise ValueError("its thoughts do not end")
    return rest if end else text


def mean_of_given(scores: ArrayLike) -> float:
    """Return the mean of the scores that are given, NaN being none; NaN where there is none."""
    every = np.asarray(scores, dtype=np.float64)
    given = every[~np.isnan(every)]
    return float(given.mean()) if given.size else math.nan


def graded(keys: tuple[str, ...], scale: tuple[int, int]) -> VerdictForm:
    """Return the form of grades on a scale, whose ends stand for 0 and 1."""
    low, high = scale
    return VerdictForm(keys, {grade: (grade - low) / (high - low) for grade in range(low, high + 1)})


def preferred(of_first: bool) -> VerdictForm:
    """Return the form of a comparison; its score is that of the first reply, or else of the second."""
    won = 1.0 if of_first else 0.0
    note = f"this reply stood {'first' if of_first else 'second'}"
    return VerdictForm(("better",), {"first": won, "second": 1.0 - won, "tie": 0.5}, note)
