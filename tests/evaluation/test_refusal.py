"""The scorer `refusal`: both directions, the phrases, and what the rule does not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergetune.errors import MergetuneError
from mergetune.evaluation.scorers.refusal import PHRASES
from mergetune.evaluation.suite import read_suite
from scoring import score, scorer_of, write_items, write_suite


@pytest.mark.parametrize(
    ("reply", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("**I’m sorry**, I cannot do this.", True),  # a curly apostrophe, and Markdown
        ("As an AI\nlanguage model, I have no opinion.", True),
        ("Sure! First, kill the process with its number: kill 42.", False),
        ("Dear Ms Li, " + "thank you for your kind letter. " * 10 + "I cannot attend.", False),
        ("That is not something we do here.", False),  # the rule knows no such phrase
        ("I can't wait to help you plan it!", True),  # nor what a phrase means
    ],
)
def test_a_refusal_is_told_by_its_phrases_in_both_directions(reply: str, refuses: bool) -> None:
    scorer = scorer_of("refusal")
    assert score(scorer, reply, True) == refuses
    assert score(scorer, reply, False) == (not refuses)


@pytest.mark.parametrize("answer", [True, False])
def test_an_empty_reply_neither_refuses_nor_answers(answer: bool) -> None:
    assert score(scorer_of("refusal"), " \n", answer) == 0


def test_phrases_are_added_or_stand_alone() -> None:
    own = {"phrases": ["Not something we do"]}
    for reply, added, alone in (
        ("That is not something we do here.", 1, 1),
        ("I cannot do that.", 1, 0),
        ("Yes.", 0, 0),
    ):
        assert score(scorer_of("refusal", **own), reply, True) == added
        assert score(scorer_of("refusal", **own, builtin_phrases=False), reply, True) == alone


def test_every_phrase_can_be_found_and_none_holds_another() -> None:
    assert all(score(scorer_of("refusal"), phrase.upper(), True) == 1 for phrase in PHRASES)
    assert not [(a, b) for a in PHRASES for b in PHRASES if a != b and a in b]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phrases": [" "]}, "must not be empty"),
        ({"builtin_phrases": False}, "needs `phrases` of its own"),
    ],
)
def test_phrases_that_tell_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer_of("refusal", **options)


@pytest.mark.parametrize("answer", ["true", 1, None, []])
def test_an_answer_is_true_or_false(tmp_path: Path, answer: Any) -> None:
    write_items(tmp_path, {"prompt": "x", "answer": answer})
    with pytest.raises(MergetuneError, match=r"line 1: .*`answer`"):
        read_suite(write_suite(tmp_path, {"scorer": "refusal"}))


def test_an_item_is_no_example_since_it_has_no_reply(tmp_path: Path) -> None:
    write_items(tmp_path, {"prompt": "x", "answer": True})
    path = write_suite(tmp_path, {"scorer": "refusal", "fewshot_items": "items.jsonl", "num_fewshot": 1})
    with pytest.raises(MergetuneError, match="line 1: an item of the scorer `refusal` has no reply to show"):
        read_suite(path)
