"""The scorer `numeric`: which number of a reply counts, and which answers name one."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.scorers.numeric import numbers_in
from mergetune.evaluation.suite import read_suite
from scoring import score, scorer_of, write_items, write_suite

GSM8K = "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 1,018"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("The answer is 42.", [42]),
        ("It costs $1,234.50.", [Decimal("1234.50")]),
        (r"\boxed{\$1,000}", [1000]),
        ("-5", [-5]),
        ("x = −5", [-5]),  # the sign that is no hyphen
        ("-$5 or $-6", [-5, -6]),
        ("3-5 pages, 10 - 4", [3, 5, 10, 4]),  # neither a hyphen nor an operator is a sign
        ("50%", [50]),
        ("**.5**", [Decimal("0.5")]),
        ("Rs.500", [500]),
        ("1,2,3", [1, 2, 3]),
        ("1,2345", [1, 2345]),  # no thousands are set off so
        ("1e3 and 2E-2", [1000, Decimal("0.02")]),
        ("1e9999999999", [1]),
        ("CO2", []),
        ("none", []),
    ],
)
def test_numbers_are_read_as_they_are_written(text: str, numbers: list[Any]) -> None:
    assert numbers_in(text) == numbers


@given(st.integers(-(10**12), 10**12))
def test_thousands_may_be_set_off(number: int) -> None:
    assert numbers_in(f"So it is {number:,}.") == [number]


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("3 + 4 = 7", 7, 1),
        ("7, since 3 + 4", 7, 0),
        ("$1018.00", GSM8K, 1),
        ("18", GSM8K, 0),
        ("I do not know.", 7, 0),
        ("2.50", 2.5, 1),
        ("2.5000001", 2.5, 0),
        ("seven: 7", "7 apples", 1),
        ("9" * 5000, 9, 0),
    ],
)
def test_the_last_number_of_the_reply_is_compared(reply: str, answer: Any, expected: float) -> None:
    assert score(scorer_of("numeric"), reply, answer) == expected


def test_a_tolerance_is_met_exactly() -> None:
    assert score(scorer_of("numeric", tolerance=0.1), "1.1", 1) == 1
    assert score(scorer_of("numeric", tolerance=0.1), "1.1000001", 1) == 0
    assert score(scorer_of("numeric", relative_tolerance=0.01), "-202", -200) == 1
    assert score(scorer_of("numeric", relative_tolerance=0.01), "-197.9", -200) == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (True, "there is no number"),
        ("none", "there is no number"),
        ("3 of 4", "there are several numbers"),
        ([3], "there is no number"),
        (None, "needs `answer`"),
        (0.5, "holds the stop string"),
    ],
)
def test_an_answer_without_one_number_is_refused(tmp_path: Path, answer: Any, message: str) -> None:
    write_items(tmp_path, {"prompt": "x", "answer": answer})
    with pytest.raises(MergetuneError, match=rf"items\.jsonl, line 1: .*{message}"):
        read_suite(write_suite(tmp_path, {"scorer": "numeric", "stop": ["."]}))


def test_an_example_shows_the_whole_answer_and_a_report_its_number() -> None:
    scorer, item = scorer_of("numeric"), Item(prompt="x", answer=GSM8K)
    assert scorer.answer_text(item) == GSM8K
    assert scorer.wanted_reply(item) == Message(role="assistant", content=GSM8K)
    assert scorer.target_text(item) == "1018"
