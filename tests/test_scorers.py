"""Scorers: what counts as right, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from optimizer.scorers import Scorer, json_equal, parse_json

CALL = {"tool": "add", "arguments": {"title": "z", "tags": ["x", "y"], "days": 3}}


@pytest.mark.parametrize(
    ("kind", "reply", "answer", "score"),
    [
        ("exact", " Paris \n", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("contains", "It is Paris.", "Paris", 1),
        ("contains", "Paris and Rome", ["Rome", "Paris"], 1),
        ("contains", "Paris", ["Rome", "Paris"], 0),
        ("json", '{"arguments": {"days": 3.0, "tags": ["x", "y"], "title": "z"}, "tool": "add"}', CALL, 1),
        ("json", '```json\n{"a": 1}\n```', {"a": 1}, 1),
        ("json", 'Sure! {"a": 1}', {"a": 1}, 0),
        ("json", '{"a": true}', {"a": 1}, 0),
        ("json", '{"tags": ["b", "a"]}', {"tags": ["a", "b"]}, 0),
        ("json", '{"a": 1', {"a": 1}, 0),
        ("json", "null", {"a": 1}, 0),
        ("json", "[" * 100_000, [], 0),
    ],
)
def test_scores(kind: Any, reply: str, answer: Any, score: float) -> None:
    assert Scorer(kind=kind).score(reply, answer) == score


def test_case_may_be_ignored() -> None:
    assert Scorer(kind="exact", ignore_case=True).score("PARIS", "paris") == 1
    assert Scorer(kind="regex", ignore_case=True, patterns=("^yes",)).score("YES!", None) == 1


def test_regex_scores_the_share_of_patterns_found() -> None:
    scorer = Scorer(kind="regex", patterns=(r"\?$", "^You"))
    assert scorer.score("You can. Ready?", None, ["tax", "10 minutes"]) == 0.5


def test_more_digits_than_python_reads_are_a_wrong_answer() -> None:
    assert Scorer(kind="json").score("9" * 5000, 9) == 0


def test_json_of_not_a_number_is_no_number() -> None:
    assert not json_equal(parse_json("NaN"), 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "regex", "patterns": ["("]}, "regular expression"),
        ({"kind": "exact", "patterns": ["x"]}, "belongs to the scorer `regex`"),
        ({"kind": "json", "per_character": True}, "belongs to the scorer `choice`"),
    ],
)
def test_options_of_another_scorer_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer.model_validate(fields)
