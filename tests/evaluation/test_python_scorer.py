"""The scorer `python`: a user's own function, what it may return, and what is said where it fails."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers import BaseScorer
from mergetune.evaluation.suite import read_suite
from scoring import scorer_of, write_items, write_suite

ITEMS = [Item(prompt=f"Say {word}.", answer=word, metadata={"id": f"no. {word}"}) for word in ("a", "b")]
TASK = {"scorer": {"kind": "python", "function": "scoring_rules.py:score"}}


def with_function(folder: Path, body: str, function: str = "scoring_rules.py:score") -> BaseScorer:
    (folder / "scoring_rules.py").write_text(body)
    scorer = scorer_of("python", function=function)
    scorer.read_files(folder)
    return scorer


def returning(folder: Path, expression: str) -> BaseScorer:
    return with_function(folder, f"def score(items, replies):\n    return {expression}\n")


def test_the_function_sees_items_and_replies_together(tmp_path: Path) -> None:
    scorer = returning(
        tmp_path,
        "[0.5 * (i.answer in r) + 0.5 * (i.metadata['id'][-1] == r) for i, r in zip(items, replies)]",
    )
    assert scorer.score(ITEMS, ["a", "b!"]) == [1, 0.5]
    assert scorer.score([], []) == []


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("[1]", "must return a list of one number for each of 2 items"),
        ("None", "must return a list of one number for each of 2 items, but returned None"),
        ("[1, 2]", r"numbers in \[0, 1\], but returned 2 for the item `no\. b` 'Say b\.'"),
        ("[-0.1, 1]", "returned -0.1 for the item `no. a`"),
        ("[float('nan'), 1]", "returned nan"),
        ("['1', 1]", "returned '1'"),
        ("[None, 1]", "returned None"),
    ],
)
def test_what_is_returned_is_checked(tmp_path: Path, expression: str, message: str) -> None:
    with pytest.raises(MergetuneError, match=message):
        returning(tmp_path, expression).score(ITEMS, ["a", "b"])


def test_numbers_of_numpy_and_truth_values_are_numbers(tmp_path: Path) -> None:
    scorer = with_function(
        tmp_path, "import numpy as np\ndef score(items, replies):\n    return [np.float32(0.5), True]\n"
    )
    found = scorer.score(ITEMS, ["a", "b"])
    assert found == [0.5, 1]
    assert all(type(each) is float and math.isfinite(each) for each in found)


def test_an_exception_names_item_file_and_line(tmp_path: Path) -> None:
    scorer = with_function(
        tmp_path,
        "def score(items, replies):\n    return [part(r) for r in replies]\n\n\n"
        "def part(reply):\n    return float(reply)\n",
    )
    with pytest.raises(MergetuneError) as caught:
        scorer.score(ITEMS, ["1", "one"])
    assert str(caught.value) == (
        "`scoring_rules.py:score` raised an exception at the item `no. b` 'Say b.': ValueError: could not "
        f"convert string to float: 'one' ({tmp_path}/scoring_rules.py, line 6: return float(reply))."
    )


def test_an_exception_of_a_whole_batch_names_no_item(tmp_path: Path) -> None:
    scorer = returning(tmp_path, "[1 / (2 - len(items))]")
    with pytest.raises(MergetuneError, match="raised an exception: ZeroDivisionError: division by zero"):
        scorer.score(ITEMS, ["a", "b"])


@pytest.mark.parametrize(
    ("function", "body", "message"),
    [
        ("other.py:score", "", r"other\.py: there is no such file"),
        ("scoring_rules.py:other", "score = 1", r"must have the function `other\(items, replies\)`"),
        ("scoring_rules.py:score", "score = 1", "must have the function `score"),
        ("scoring_rules.py:score", "def score(:", r"cannot be loaded: SyntaxError: .*line 1"),
        ("scoring_rules.py:score", "import no_such_module", r"No module named 'no_such_module' \(.*line 1"),
        ("scoring_rules.py:score", "exit(3)", r"cannot be loaded: SystemExit: 3"),
    ],
)
def test_a_function_that_cannot_be_had_is_found_before_any_work(
    tmp_path: Path, function: str, body: str, message: str
) -> None:
    with pytest.raises(MergetuneError, match=message):
        with_function(tmp_path, body, function)


@pytest.mark.parametrize(
    "function", ["scoring_rules.py", "score", "scoring_rules:score", "scoring_rules.py:1"]
)
def test_a_function_is_named_by_file_and_name(function: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        scorer_of("python", function=function)


def test_modules_beside_it_are_imported_and_belong_to_the_rules(tmp_path: Path) -> None:
    """Each folder has its own, and a file that was not imported does not count."""

    def measured(folder: str, points: str, other: str = "") -> tuple[float, str]:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "points.py").write_text(f"POINTS = {points}\n")
        (place / "unrelated.py").write_text(other)
        body = "from points import POINTS\n\n\ndef score(items, replies):\n    return [POINTS] * len(items)\n"
        scorer = with_function(place, body)
        write_items(place, *({"prompt": item.prompt} for item in ITEMS))
        rules = Evaluator(read_suite(write_suite(place, TASK))).rules
        return scorer.score(ITEMS, ["a", "b"])[0], rules

    first, elsewhere, unrelated = measured("a", "0.25"), measured("b", "0.25"), measured("a", "0.25", "x = 1")
    changed = measured("a", "0.75")
    assert first == elsewhere == unrelated
    assert changed[0] == 0.75
    assert changed[1] != first[1]


def test_a_file_is_loaded_once_for_one_content(tmp_path: Path) -> None:
    body = "import pathlib\nwith open({!r}, 'a') as file:\n    file.write('x')\ndef score(i, r): ...\n"
    counted = tmp_path / "loads"
    for _ in range(2):
        with_function(tmp_path, body.format(str(counted)))
    assert counted.read_text() == "x"
    with_function(tmp_path, body.format(str(counted)) + "# changed\n")
    assert counted.read_text() == "xx"


def test_dataclasses_with_postponed_annotations_work(tmp_path: Path) -> None:
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Own:\n"
        "    points: float\n\n\ndef score(items, replies):\n    return [Own(1).points for _ in items]\n"
    )
    assert with_function(tmp_path, body).score(ITEMS, ["a", "b"]) == [1, 1]
