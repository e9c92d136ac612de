"""Rescoring: an old run's replies under another suite, with nobody asked again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import mergetune
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import ITEM_KEYS
from mergetune.evaluation.judging.agreement import Agreement
from mergetune.results.run_dir import RunDir
from plain_server import plain_server
from studies import run, write_study


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> RunDir:
    folder = tmp_path_factory.mktemp("finished")
    run(write_study(folder, tiny_base, {"a": tiny_experts["a"], "b": tiny_experts["b"]}), folder / "run")
    return RunDir(folder / "run")


def rewritten(run: RunDir, folder: Path, change: Any) -> Path:
    """Write the suite of a run anew, changed, with its items beside it."""
    suite = Path(run.study.suite)
    for file in suite.parent.glob("*.jsonl"):
        shutil.copyfile(file, folder / file.name)
    data = yaml.safe_load(suite.read_text())
    change(data)
    (folder / "suite.yaml").write_text(yaml.safe_dump(data))
    return folder / "suite.yaml"


def test_the_same_suite_gives_the_same_scores(finished: RunDir, tmp_path: Path) -> None:
    found = mergetune.rescore(finished.path, finished.study.suite, tmp_path / "again")
    again = RunDir(tmp_path / "again")
    assert found.lacking == {}
    assert found.report.is_file()
    assert [each.name for each in again.candidates()] == [each.name for each in finished.candidates()]
    for split in ("search", "holdout"):
        assert again.all_scores(split) == finished.all_scores(split)
    assert (again.noise() is None) == (finished.noise() is None)


def test_other_scorers_margins_and_guards_are_computed_from_the_replies(
    finished: RunDir, tmp_path: Path
) -> None:
    """Held against scores by hand: how many replies hold the letter e."""

    def change(data: dict[str, Any]) -> None:
        (task,) = data["objectives"]["words"]["tasks"]
        task["scorer"] = {"kind": "regex", "patterns": ["e"]}
        data["guards"]["calm"]["margin"] = 0.5

    suite = rewritten(finished, tmp_path, change)
    file = tmp_path / "words.jsonl"
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    found = mergetune.rescore(finished.path, suite, tmp_path / "new")
    new = RunDir(tmp_path / "new")
    assert found.lacking == {}
    for candidate in finished.candidates():
        was = finished.measurement(candidate.name, "search")
        now = new.measurement(candidate.name, "search")
        assert was is not None
        assert now is not None
        words = was[was["score_name"] == "words"]
        by_hand = words["response"].str.contains("e").mean()
        scores = new.scores(candidate.name, "search")
        assert scores is not None
        assert scores["words"].value == pytest.approx(by_hand)
    assert new.study.suite_config.guards["calm"].margin == 0.5


def test_how_far_a_judge_agrees_with_people_is_kept_and_shown(finished: RunDir, tmp_path: Path) -> None:
    labels = [{"prompt": f"Say {i}.", "reply": "x", "label": 1 + i % 5} for i in range(10)]
    (tmp_path / "human.jsonl").write_text("\n".join(map(json.dumps, labels)))
    (tmp_path / "rubric.md").write_text("Score how friendly the reply is.")

    def change(data: dict[str, Any]) -> None:
        (task,) = data["objectives"]["words"]["tasks"]
        judge = {"kind": "judge", "model": "plain", "url": url}
        task["scorer"] = judge | {"rubric": "rubric.md", "labels": "human.jsonl"}

    verdict = json.dumps({"reason": "So.", "score": 3})
    with plain_server(lambda _: (200, {"choices": [{"message": {"content": verdict}}]})) as url:
        suite = rewritten(finished, tmp_path, change)
        (tmp_path / "words.jsonl").write_text(
            "\n".join(json.dumps({"prompt": f"Say {i}."}) for i in range(16))
        )
        with pytest.warns(UserWarning, match="agrees too little"):
            found = mergetune.rescore(finished.path, suite, tmp_path / "new", cache=tmp_path / "cache")
    kept = RunDir(tmp_path / "new").agreements()
    assert kept == {"words": {"words:words.jsonl": Agreement("plain", 10, 0.2, 0.0)}}
    page = found.report.read_text()
    assert "20% of 10 labelled replies graded as by people, kappa 0.00" in page
    assert "words: The judge <code>plain</code> agrees too little with people" in page


def test_items_without_replies_are_named_and_left_out(finished: RunDir, tmp_path: Path) -> None:
    suite = rewritten(finished, tmp_path, lambda _: None)
    file = tmp_path / yaml.safe_load(suite.read_text())["objectives"]["words"]["tasks"][0]["items"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "prompt": "Nobody was asked this."}])))
    found = mergetune.rescore(finished.path, suite, tmp_path / "more")
    assert list(found.lacking.values()) == [1]
    kept = RunDir(tmp_path / "more").measurement("base", "search")
    was = finished.measurement("base", "search")
    assert kept is not None
    assert was is not None
    pd.testing.assert_frame_equal(kept[[*ITEM_KEYS, "score"]], was[[*ITEM_KEYS, "score"]])


def test_prompts_that_were_not_asked_are_refused(finished: RunDir, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["objectives"]["words"]["tasks"][0]["system"] = "Another system message."

    suite = rewritten(finished, tmp_path, change)
    with pytest.raises(
        MergetuneError, match=r"0 of \d+ items in the search split have one from every candidate"
    ):
        mergetune.rescore(finished.path, suite, tmp_path / "other")
