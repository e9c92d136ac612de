"""The scorer `similarity`: the values are those of sacrebleu and rouge-score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import read_suite
from scoring import score, scorer_of, write_items, write_suite

RIGHT = "The cat sat on the mat, and slept."
PAIRS = [
    ("The cat sat on a mat.", RIGHT),
    ("A dog slept.", RIGHT),
    ("cat", RIGHT),
    ("Die Katze schläft.", "Die Katze schlief auf der Matte."),
]
MEASURES = ["chrf", "rouge_l", "bleu"]


@pytest.mark.parametrize(("reply", "right"), PAIRS)
def test_the_values_are_those_of_the_libraries(reply: str, right: str) -> None:
    rouge = RougeScorer(["rougeL"]).score(right, reply)["rougeL"].fmeasure
    expected = {
        "chrf": sacrebleu.sentence_chrf(reply, [right]).score / 100,
        "rouge_l": rouge,
        "bleu": sacrebleu.sentence_bleu(reply, [right]).score / 100,
    }
    found = {name: score(scorer_of("similarity", measure=name), reply, right) for name in MEASURES}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_best_of_several_answers_counts(measure: str) -> None:
    scorer = scorer_of("similarity", measure=measure)
    assert score(scorer, f" {RIGHT}\n", ["Something else.", RIGHT]) == 1
    assert score(scorer, "", RIGHT) == 0
    one, both = (score(scorer, "The cat sat.", answer) for answer in (RIGHT, [RIGHT, "The cat sat there."]))
    assert 0 < one < both < 1


@pytest.mark.parametrize(
    ("measure", "answer", "message"),
    [
        ("chrf", "", "must have something that `chrf` counts"),
        ("bleu", " ", "must have something that `bleu` counts"),
        ("rouge_l", ["A cat.", "猫が寝た。"], 'something that `rouge_l` counts, .* but holds "猫が寝た。"'),
        ("chrf", [], "must not be empty"),
        ("chrf", {"a": 1}, "must be text"),
        ("chrf", None, "needs `answer`"),
    ],
)
def test_an_answer_that_no_reply_is_like_is_refused(
    tmp_path: Path, measure: str, answer: Any, message: str
) -> None:
    write_items(tmp_path, {"prompt": "x", "answer": answer})
    path = write_suite(tmp_path, {"scorer": {"kind": "similarity", "measure": measure}})
    with pytest.raises(MergetuneError, match=f"line 1: .*{message}"):
        read_suite(path)
