"""A judge without a verdict on single replies: the others are scored, up to a bound."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from helpers import mergetune
from judged import Body, data_of, question, says, silent_on, write_judged_suite
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import Measurement
from mergetune.evaluation.item_scores import item_scores
from mergetune.evaluation.items import Item
from mergetune.evaluation.judging.judge import judge_of
from mergetune.evaluation.judging.verdicts import Explained
from mergetune.evaluation.missing_verdicts import missing_verdicts
from mergetune.evaluation.scorers import JudgeScorer
from mergetune.evaluation.scorers.judge import Pairwise
from mergetune.evaluation.suite import SamplingConfig, read_suite
from plain_server import plain_server


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGETUNE_CACHE", str(tmp_path / "cache"))


def scorer_of(folder: Path, url: str, **options: Any) -> JudgeScorer:
    path = write_judged_suite(folder, url, 2, options)
    scorer = read_suite(path).config.objectives["tone"].tasks[0].scorer
    assert isinstance(scorer, JudgeScorer)
    return scorer


def items_of(count: int) -> list[Item]:
    return [Item(prompt=question(number)) for number in range(count)]


def test_a_reply_without_a_verdict_has_no_score_and_is_asked_again_by_the_next_process(
    tmp_path: Path,
) -> None:
    seen: list[str] = []
    with plain_server(silent_on(question(3), seen=seen)) as url:
        scorer = scorer_of(tmp_path, url)
        found = scorer.score(items_of(20), ["Hi"] * 20)
        assert [number for number, score in enumerate(found) if math.isnan(score)] == [3]
        assert seen.count(question(3)) == 3
        assert scorer.score(items_of(20), ["Hi"] * 20) == pytest.approx(found, nan_ok=True)
        assert len(seen) == 19 + 3, "in one process nothing is asked again"
        judge_of.cache_clear()  # as in the next process
        scorer.score(items_of(20), ["Hi"] * 20)
        assert seen[22:] == [question(3)] * 3
    judge_of.cache_clear()
    with plain_server(silent_on()) as url:  # a better one of the same name
        scorer = scorer_of(tmp_path, url)
        assert not any(map(math.isnan, scorer.score(items_of(20), ["Hi"] * 20)))


@pytest.mark.parametrize(
    ("n_replies", "n_unjudged", "fits"),
    [(20, 1, True), (20, 2, False), (99, 2, False), (100, 2, True), (100, 3, False), (150, 3, True)],
)
def test_a_judge_with_too_few_verdicts_is_unfit(
    tmp_path: Path, n_replies: int, n_unjudged: int, fits: bool
) -> None:
    seen: list[str] = []
    silent = list(map(question, range(n_unjudged)))
    with plain_server(lambda body: silent_on(*silent, seen=seen)(body)) as url:
        scorer = scorer_of(tmp_path, url)
        if fits:
            found = scorer.score(items_of(n_replies), ["Hi"] * n_replies)
            assert sum(map(math.isnan, found)) == n_unjudged
            return
        text = (
            rf"The judge `plain`: .* {n_unjudged} of {n_replies} replies, of which {n_unjudged - 1} may lack "
            r"one, such as for the item 'Question \d+\?': it holds no JSON .* 'Five stars!'.* are kept: run"
        )
        with pytest.raises(MergetuneError, match=text) as error:
            scorer.score(items_of(n_replies), ["Hi"] * n_replies)
        assert not isinstance(error.value, TrialError)  # it is not the candidate's fault
        given = set(seen) - set(silent)
        silent.clear()  # mended, as this process goes on
        seen.clear()
        assert not any(map(math.isnan, scorer.score(items_of(n_replies), ["Hi"] * n_replies)))
    assert not given & set(seen)
    assert len(seen) == n_replies - len(given)


def test_an_unfit_judge_is_asked_no_more_than_it_takes_to_know(tmp_path: Path) -> None:
    seen: list[str] = []
    with (
        plain_server(silent_on(*map(question, range(200)), seen=seen)) as url,
        pytest.raises(MergetuneError, match="5 of 200 replies, of which 4 may lack one"),
    ):
        scorer_of(tmp_path, url, concurrency=1).score(items_of(200), ["Hi"] * 200)
    assert len(seen) <= 3 * 6


def test_a_comparison_needs_both_orders() -> None:
    def answer(body: Body) -> tuple[int, Any]:
        data = data_of(body)
        if data["first"] == "Oslo" and data["second"] == "bad":
            return 200, {"choices": [{"message": {"content": "Neither."}}]}
        return says(better="first")

    items = [Item(prompt="x", answer="Oslo"), Item(prompt="y", answer="Lima")]
    with plain_server(answer) as url:
        scorer = JudgeScorer(model="plain", url=url, pairwise=Pairwise(reference="answer"))
        assert scorer.score(items, ["bad", "bad"]) == pytest.approx([math.nan, 0.5], nan_ok=True)


def repeated(*grades: int | None) -> Callable[[Body], tuple[int, Any]]:
    """Give one grade after the other; None: nonsense, three times."""
    said = iter([grade for grade in grades for _ in range(3 if grade is None else 1)])

    def answer(_: Body) -> tuple[int, Any]:
        grade = next(said)
        return (200, {"choices": [{"message": {"content": "Well."}}]}) if grade is None else says(score=grade)

    return answer


def test_repeats_that_have_a_verdict_count(tmp_path: Path) -> None:
    with plain_server(repeated(1, None, 4, None, None, None)) as url:
        scorer = scorer_of(tmp_path, url, repeats=3, temperature=1.0, concurrency=1)
        assert scorer.score(items_of(1), ["Hi"]) == [0.375]
        with warnings.catch_warnings(action="error"):
            found = scorer.score(items_of(2), ["Hi", "Bye"])
            assert found == pytest.approx([0.375, math.nan], nan_ok=True)
            quality = scorer.quality(items_of(2), ["Hi", "Bye"])
    assert quality.within_variance == pytest.approx(np.var([0, 0.75], ddof=1))


def test_labels_without_a_verdict_say_nothing_of_agreement(tmp_path: Path) -> None:
    rows = [{"prompt": question(0), "reply": f"reply {grade}", "label": grade} for grade in (1, 2, 4, 5)]
    rows.append({"prompt": question(1), "reply": "x", "label": 3})
    (tmp_path / "human.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def answer(body: Body) -> tuple[int, Any]:
        reply = data_of(body)["reply"]
        grade = reply.removeprefix("reply ")
        return says(score=int(grade)) if grade.isdigit() else silent_on(question(1))(body)

    with plain_server(answer) as url:
        scorer = scorer_of(tmp_path, url, labels="human.jsonl")
        scorer.score(items_of(1), ["Hi"])
    assert scorer.agreement is not None
    assert (scorer.agreement.n_labels, scorer.agreement.kappa) == (4, 1.0)


@pytest.mark.parametrize(
    ("count", "expected"), [("mean", (0.5 + 1.0) / 2), ("worst", (0.25 + 1.0) / 2), ("none", math.nan)]
)
def test_turns_and_repeats_that_have_a_verdict_count(tmp_path: Path, count: str, expected: float) -> None:
    turns = [{"role": role, "content": role} for _ in range(3) for role in ("user", "assistant")]
    config = read_suite(write_judged_suite(tmp_path, "http://127.0.0.1:1", 2)).config
    task = config.objectives["tone"].tasks[0]
    grades = [0.25, 0.75, math.nan, 1.0, math.nan, math.nan]  # three turns, two repeats of each
    grades = [math.nan] * 6 if count == "none" else grades

    class Fixed(JudgeScorer):
        def explained(self, items: Any, replies: Any) -> list[Explained]:
            return [Explained(grade, "") for grade in grades]

    assert isinstance(task.scorer, JudgeScorer)
    sampling = SamplingConfig(temperature=1, repeats=2, count="worst" if count == "worst" else "mean")
    fixed = Fixed(model="plain", rubric="x")
    own = task.model_copy(update={"scorer": fixed, "sampling": sampling, "score_turns": "all"})
    item = Item(prompt="user", messages=turns[:-1], target=turns[-1])
    with warnings.catch_warnings(action="error"):
        (found,) = item_scores(own, [item], [["r"] * 6])
    assert found.value == pytest.approx(expected, nan_ok=True)
    assert found.n_unjudged == sum(map(math.isnan, grades))


def test_the_mean_and_its_error_are_those_of_the_items_with_a_verdict() -> None:
    values = {"a": [0.0, 1.0, math.nan, 0.5], "b": [0.25, 0.75, 1.0]}
    rows = [
        {"score_name": "tone", "task": task, "item": f"{task}{i}", "score": value}
        for task, own in values.items()
        for i, value in enumerate(own)
    ]
    frame = pd.DataFrame(rows).assign(aggregation="mean", parts=None)
    found = Measurement(frame, 0.0).scores()["tone"]
    a, b = [0.0, 1.0, 0.5], values["b"]
    assert found.value == pytest.approx((np.mean(a) + np.mean(b)) / 2)
    error = math.sqrt(np.var(a, ddof=1) / 3 + np.var(b, ddof=1) / 3) / 2
    assert found.stderr == pytest.approx(error)
    assert found.n_items == 6
    alone = Measurement(frame[frame["item"].isin(["a1", "a2"])], 0.0).scores()["tone"]
    assert (alone.value, alone.stderr, alone.n_items) == (1.0, math.inf, 1)
    assert Measurement(frame[frame["item"] == "a2"], 0.0).scores() == {}


def test_a_warning_counts_replies_by_task_and_names_one() -> None:
    items = pd.DataFrame(
        {"score_name": "s", "task": ["t", "t", "u"], "item": list("abc"), "prompt": ["A?", "B?", "C?"]}
    )
    first, second = (items.assign(score=1.0, unjudged=each) for each in ([0, 2, 0], [0, 1, 0]))
    (found,) = missing_verdicts([("one", first), ("two", second)], lambda: items)
    assert found.startswith(
        "`t`: the judge gave no verdict on 3 replies (4 items were scored), such as that "
    )
    assert " of `one` to 'B?'." in found
    assert missing_verdicts([("one", first[first["task"] == "u"]), ("old", items)], lambda: items) == []


def test_eval_goes_on_without_a_verdict_and_says_so(tmp_path: Path, tiny_base: Path) -> None:
    with plain_server(silent_on(question(3))) as url:
        suite = write_judged_suite(tmp_path, url, 20)
        command = ["eval", tiny_base, "--suite", suite, "--engine", "transformers"]
        done = mergetune(*command, "--out", tmp_path / "own.parquet")
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(tmp_path / "own.parquet")
    assert frame["score"].isna().sum() == frame["unjudged"].sum() == 1
    assert done.stdout.split()[:2] == ["tone", f"{frame['score'].mean():.3g}"]
    assert "(19 items)" in done.stdout
    said = " ".join(done.stderr.split())
    assert "warning: eval: `tone:items.jsonl`: the judge gave no verdict on 1 reply (20 items were" in said
    assert "such as that to 'Question 3?'" in said


def test_above_the_bound_eval_ends_with_an_error_and_keeps_the_verdicts(
    tmp_path: Path, tiny_base: Path
) -> None:
    seen: list[str] = []
    with plain_server(silent_on(question(17), question(18), seen=seen)) as url:
        suite = write_judged_suite(tmp_path, url, 20)
        command = ["eval", tiny_base, "--suite", suite, "--engine", "transformers"]
        done = mergetune(*command)
        assert (done.returncode, done.stdout) == (3, "")
        said = " ".join(done.stderr.split())
        assert "3 times there was none for 2 of 20 replies, of which 1 may lack one" in said
        assert "Take a judge that follows instructions" in said
        given = set(seen) - {question(17), question(18)}
        assert given
    seen.clear()
    with plain_server(silent_on(seen=seen)) as url:
        write_judged_suite(tmp_path, url, 20)
        again = mergetune(*command)
    assert again.returncode == 0, again.stderr
    assert not given & set(seen)
    assert "no verdict" not in again.stderr
