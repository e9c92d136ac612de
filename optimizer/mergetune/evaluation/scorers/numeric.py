"""The scorer `numeric`: the last number of the reply is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from pydantic import Field

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer, shown, stop_problem, text_of

# A sign that stands after a letter, a digit or a bracket is a hyphen or an operator: `10-5`, `pages 3-5`.
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\]]) [-−+] )?
    (?: \\?[$€£] \s? (?P<second_sign> [-−+] )? )?
    (?<! [A-Za-z_\d] )
    (?P<digits> (?: \d{1,3} (?: , \d{3} )+ (?! \d ) | \d+ ) (?: \. \d+ )? | (?<! [\w.] ) \. \d+ )
    (?P<exponent> [eE] [-+]? \d{1,3} (?! \w ) )?
    """,
    re.VERBOSE,
)
_GSM8K = "####"  # what stands before the answer of an item of GSM8K (Cobbe et al. 2021)


class NumericScorer(BaseScorer):
    """The last number of the reply is the answer's, or differs by no more than a tolerance allows.

    Thousands may be set off by commas; currencies and `%` do not count, so that `50%` is 50.
    """

    needs = "`answer`: a number, text with one number, or an answer of GSM8K, with its number after `####`"
    scores = "1 if the last number of the reply is the answer's, or is as near to it as a tolerance allows"

    kind: Literal["numeric"] = "numeric"
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False)
    relative_tolerance: float = Field(0.0, ge=0, lt=1)

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`."""
        return [float(self._is_right(item, reply)) for item, reply in zip(items, replies, strict=True)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:
        """See `BaseScorer.check_item`."""
        if problem := self.lacking(item, is_example=is_example):
            return problem
        found = _numbers_in_answer(item)
        if len(found) == 1:
            is_exact = not (self.tolerance or self.relative_tolerance)
            return stop_problem([self.target_text(item)], stop) if is_exact else None
        return (
            "`answer` must be a number, text with one number, or an answer of GSM8K, whose number stands "
            f"after `{_GSM8K}`, but there {'are several numbers' if found else 'is no number'} in "
            f"{shown(item.answer)}."
        )

    def target_text(self, item: Item) -> str:
        """See `BaseScorer.target_text`: the number alone."""
        return f"{_numbers_in_answer(item)[0]:f}"

    def _is_right(self, item: Item, reply: str) -> bool:
        wanted, found = _numbers_in_answer(item)[0], numbers_in(reply)
        if not found:
            return False
        allowed = max(Decimal(repr(self.tolerance)), Decimal(repr(self.relative_tolerance)) * abs(wanted))
        return abs(found[-1] - wanted) <= allowed


def numbers_in(text: str) -> list[Decimal]:
    """Return the numbers that stand in a text."""
    return [_value(match) for match in _NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> Decimal:
    is_negative = (match["sign"] or match["second_sign"] or "") in ("-", "−")
    value = Decimal(match["digits"].replace(",", "") + (match["exponent"] or ""))
    return -value if is_negative else value


def _numbers_in_answer(item: Item) -> list[Decimal]:
    """Return the numbers that an answer holds where its number should stand: exactly one, if it is sound."""
    if not isinstance(item.answer, (str, int, float)) or isinstance(item.answer, bool):
        return []
    return numbers_in(text_of(item.answer).rpartition(_GSM8K)[2])
