"""Near copies: folding changes nothing twice, and case, punctuation and white space hide nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetune.evaluation.near_copies import Finder, Question, normalize, words_of

WORD = st.text("abcdefghijklmnopqrstuvwxyzäéßøжπ0123456789", min_size=1, max_size=8)
GAP = st.sampled_from([" ", "  ", "\t", ", ", "; ", " “", "… ", ". ", "_", " (", "!? "])


def question(text: str) -> Question:
    return Question(words_of(text), words_of(text), (), ("",))


@given(st.text())
def test_normalization_is_idempotent(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@given(st.text("aß éÉ.,-+*/0123\n\tΣς２①ﬁ한글中カ", max_size=30))
def test_normalization_is_idempotent_for_mixed_scripts(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@given(st.lists(WORD, min_size=3, max_size=40), st.data())
def test_case_punctuation_and_white_space_hide_nothing(words: list[str], data: st.DataObject) -> None:
    gaps = data.draw(st.lists(GAP, min_size=len(words), max_size=len(words)))
    loud = data.draw(st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    changed = "".join(
        (word.upper() if up else word) + gap for word, gap, up in zip(words, gaps, loud, strict=True)
    )
    finder = Finder([question(" ".join(words))])
    assert finder.find([changed]) == {0}
    assert len(Finder([question(" ".join(words)), question(changed)]).groups()) == 1


@given(st.lists(WORD, min_size=20, max_size=60), st.lists(WORD, max_size=40), st.lists(WORD, max_size=40))
def test_a_question_is_found_anywhere_in_a_text(
    words: list[str], before: list[str], after: list[str]
) -> None:
    assert Finder([question(" ".join(words))]).find([" ".join([*before, *words, *after])]) == {0}


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("Straße", "STRASSE"),
        ("ﬁle２", "FILE2"),
        ("snake_case", "Snake case"),
        ("3 × 4", "3×4"),
        ("don’t", "don't"),
    ],
)
def test_forms_that_are_one(one: str, same: str) -> None:
    assert normalize(one) == normalize(same)


def test_groups_hold_every_question_once() -> None:
    texts = ["a b c", "A, b c!", "d e f", "a b c d"]
    assert Finder([question(text) for text in texts]).groups() == [[0, 1], [2], [3]]
