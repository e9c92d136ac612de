"""The regression gate on tiny real models: what is measured, what is known, and how the command ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from sacrebleu.metrics.chrf import CHRF

from helpers import fine_tune, mergetune
from judged import question, silent_on, write_judged_suite
from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import ITEM_KEYS, Evaluator
from mergetune.evaluation.suite import Suite, read_suite
from mergetune.files.library import shared_folder
from mergetune.gate.outputs import as_markdown
from mergetune.gate.run import Checked, CheckOptions, check_models, check_stored
from mergetune.measuring.model_under_test import open_model
from mergetune.measuring.pool import Job, Pool
from mergetune.measuring.reply_store import ReplyStore
from plain_server import plain_server
from studies import write_suite

ENGINE = EngineConfig(kind="transformers")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Suite:
    folder = tmp_path_factory.mktemp("suite")
    evaluator = Evaluator(write_suite(folder, ["?"] * 150))
    with closing(Pool(open_model(str(tiny_base)), ENGINE, evaluator, None)) as pool:
        replies = pool.measured(Job("test", evaluator.documents("all"))).measurement.items["response"]
    return write_suite(folder, replies.tolist())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return fine_tune(tiny_base, tmp_path_factory.mktemp("damaged") / "model", seed=3, std=0.5)


def checked(
    candidate: Path, baseline: Path, suite: Suite, store: Path, said: list[str] | None = None, **options: Any
) -> Checked:
    models = [open_model(str(path)) for path in (candidate, baseline)]
    say = said.append if said is not None else print
    settings = CheckOptions(engine=ENGINE, **options)
    return check_models(models[0], models[1], suite, settings, ReplyStore(store), say)


def test_a_model_passes_against_itself_and_is_measured_once(
    tiny_base: Path, suite: Suite, tmp_path: Path
) -> None:
    said: list[str] = []
    found = checked(tiny_base, tiny_base, suite, tmp_path, said)
    assert found.check.verdict == "pass"
    assert found.check.noise == {"counting": 0.0}
    assert [line.partition(": ")[2] for line in said if "items measured" in line] == [
        "150 items measured",
        "150 items measured once more",
        "0 items measured, 150 known before",
    ]


def test_a_damaged_model_fails(tiny_base: Path, damaged: Path, suite: Suite, tmp_path: Path) -> None:
    check = checked(damaged, tiny_base, suite, tmp_path).check
    assert check.verdict == "fail"
    assert check.rows[0].baseline == 1
    assert len(check.flips) == check.rows[0].n_lost > 100


def test_few_items_are_inconclusive(tiny_base: Path, suite: Suite, tmp_path: Path) -> None:
    answers = [str(item.answer) for item in suite.items["items.jsonl"]]
    few = write_suite(tmp_path, answers[:12])
    assert checked(tiny_base, tiny_base, few, tmp_path / "store").check.verdict == "inconclusive"


def test_new_items_are_measured_alone(tiny_base: Path, suite: Suite, tmp_path: Path) -> None:
    answers = [str(item.answer) for item in suite.items["items.jsonl"]]
    few = write_suite(tmp_path, answers[:40])
    said: list[str] = []
    checked(tiny_base, tiny_base, few, tmp_path / "store", has_noise_floor=False)
    checked(tiny_base, tiny_base, suite, tmp_path / "store", said, has_noise_floor=False)
    assert "110 items measured, 40 known before" in said[-2]


def test_another_scorer_costs_no_inference_and_another_way_to_ask_does(
    tiny_base: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    for scorer, longest, n_known in (("exact", 4, 0), ("contains", 4, 10), ("exact", 5, 0), ("exact", 4, 10)):
        task = {"items": "items.jsonl", "scorer": scorer, "max_new_tokens": longest}
        suite = write_suite(tmp_path, ["?"] * 10, objectives={"counting": {"tasks": [task]}})
        evaluator = Evaluator(suite)
        model = open_model(str(tiny_base))
        with closing(Pool(model, ENGINE, evaluator, ReplyStore(store))) as pool:
            found = pool.measured(Job("test", evaluator.documents("all")))
        assert found.n_asked == 10 - n_known


def test_another_chat_template_is_another_model(tiny_base: Path, tmp_path: Path) -> None:
    first = open_model(str(tiny_base))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert open_model(str(copy)).digest == first.digest
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert open_model(str(copy)).digest != first.digest


@pytest.mark.parametrize("candidate", ["tiny_base", "damaged"])
def test_a_clear_verdict_comes_early(
    candidate: str, tiny_base: Path, suite: Suite, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(candidate)
    whole = checked(model, tiny_base, suite, tmp_path)
    early = checked(model, tiny_base, suite, tmp_path / "other", is_fast=True)
    assert early.check.verdict == whole.check.verdict
    assert early.check.saving is not None
    assert early.check.saving.n_measured == len(early.candidate) < early.check.saving.n_items == 150
    both = early.candidate.merge(whole.candidate, on=ITEM_KEYS, validate="one_to_one")
    assert len(both) == len(early.candidate)
    assert both["score_x"].equals(both["score_y"])
    assert both["response_x"].equals(both["response_y"])


def test_the_command_ends_with_its_verdict_and_writes_all_reports(
    tiny_base: Path, damaged: Path, suite: Suite, tmp_path: Path
) -> None:
    options = ["--baseline", tiny_base, "--suite", suite.path, "--engine", "transformers", "--store", "store"]
    failed = mergetune("check", damaged, *options, "--out", "out", cwd=tmp_path)
    assert failed.returncode == 1, failed.stderr
    assert "FAIL" in failed.stdout
    assert json.loads((tmp_path / "out" / "check.json").read_text())["verdict"] == "fail"
    assert ElementTree.parse(tmp_path / "out" / "junit.xml").find(".//failure") is not None
    assert "FAIL" in (tmp_path / "out" / "summary.md").read_text()
    assert "Count to" in (tmp_path / "out" / "index.html").read_text()
    stored = ["--from", "out/baseline.parquet", "--from", "out/baseline.parquet"]
    passed = mergetune("check", *stored, "--suite", suite.path, "--json", cwd=tmp_path)
    assert passed.returncode == 0, passed.stderr
    assert json.loads(passed.stdout)["verdict"] == "pass"


def test_wrong_calls_are_errors_and_no_verdicts(tiny_base: Path, suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "wrong.parquet").write_text("no parquet")
    wrong: dict[str, list[str | Path]] = {
        "Name CANDIDATE and --baseline": ["check", tiny_base],
        "Give --from twice": ["check", "--from", "a.parquet"],
        "`--fast`, `--batch-size`": ["check", "--from", "a", "--from", "b", "--fast", "--batch-size", "8"],
        "must be a measurement": ["check", "--from", "wrong.parquet", "--from", "wrong.parquet"],
        "there is no such recipe": ["check", "no.yaml", "--baseline", tiny_base],
    }
    for message, arguments in wrong.items():
        done = mergetune(*arguments, "--suite", suite.path, cwd=tmp_path)
        assert done.returncode == 3
        assert message in done.stderr


def test_measurements_of_other_items_are_refused(tiny_base: Path, suite: Suite, tmp_path: Path) -> None:
    found = checked(tiny_base, tiny_base, suite, tmp_path, has_noise_floor=False)
    found.baseline.to_parquet(tmp_path / "whole.parquet")
    found.baseline.head(20).to_parquet(tmp_path / "part.parquet")
    with pytest.raises(MergetuneError, match="130"):
        check_stored(tmp_path / "part.parquet", tmp_path / "whole.parquet", suite, CheckOptions())


def test_stored_measurements_are_compared_on_the_items_held_out(
    tiny_base: Path, suite: Suite, tmp_path: Path
) -> None:
    answers = [str(item.answer) for item in suite.items["items.jsonl"]]
    halved = write_suite(tmp_path, answers, holdout=0.5)
    whole = checked(tiny_base, tiny_base, halved, tmp_path / "store", split="all", has_noise_floor=False)
    file = tmp_path / "whole.parquet"
    whole.baseline.to_parquet(file)

    def n_items(split: Any) -> int:
        return check_stored(file, file, halved, CheckOptions(split)).check.n_items

    assert n_items("all") == 150
    assert n_items(None) == n_items("holdout") == 150 - n_items("search") < 150
    held_out = whole.baseline.merge(Evaluator(halved).items())
    held_out[held_out["split"] == "holdout"].to_parquet(file)
    with pytest.raises(MergetuneError, match="holds no item of the search split"):
        n_items("search")
    held_out.assign(item="x").to_parquet(file)
    with pytest.raises(MergetuneError, match="150 of its 150 items are none of the suite's"):
        n_items("all")


def test_replies_on_record_are_scored_by_the_scorer_of_now(
    tiny_base: Path, damaged: Path, suite: Suite, tmp_path: Path
) -> None:
    found = checked(damaged, tiny_base, suite, tmp_path / "store", has_noise_floor=False)
    files = tmp_path / "candidate.parquet", tmp_path / "baseline.parquet"
    for frame, file in zip((found.candidate, found.baseline), files, strict=True):
        frame.to_parquet(file)
    answers = [str(item.answer) for item in suite.items["items.jsonl"]]

    def changed(**task: Any) -> Suite:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        own = {"items": "items.jsonl", "scorer": "exact", "max_new_tokens": 4, **task}
        return write_suite(folder, answers, objectives={"counting": {"margin": 0.1, "tasks": [own]}})

    similar = changed(scorer={"kind": "similarity", "measure": "chrf"})
    (row,) = check_stored(*files, similar, CheckOptions()).check.rows
    by_hand = [CHRF().sentence_score(each.strip(), [answer]).score / 100 for each, answer in _said(found)]
    assert row.baseline == pytest.approx(1.0)
    assert row.candidate == pytest.approx(sum(by_hand) / len(by_hand))
    with pytest.raises(MergetuneError, match="was asked otherwise"):
        check_stored(*files, changed(max_new_tokens=5), CheckOptions())
    with pytest.raises(MergetuneError, match="only single replies can be scored anew"):
        check_stored(*files, changed(scorer="reply_tokens"), CheckOptions())


def _said(found: Checked) -> list[tuple[str, str]]:
    """Pair what the candidate replied with the answers, which the baseline gives."""
    both = found.candidate.merge(found.baseline, on="item")
    return list(zip(both["response_x"], both["response_y"], strict=True))


def test_training_files_of_one_name_are_both_looked_at(tiny_base: Path, suite: Suite, tmp_path: Path) -> None:
    for folder, number in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.txt").write_text(f"Count to {number}.")
    files = tuple(tmp_path / folder / "train.txt" for folder in ("a", "b"))
    found = checked(tiny_base, tiny_base, suite, tmp_path, has_noise_floor=False, training=files)
    assert [str(file) in warning for file, warning in zip(files, found.check.warnings, strict=False)] == [
        *(True, True)
    ]


def test_auto_falls_back_for_both_models(tiny_base: Path, suite: Suite, tmp_path: Path) -> None:
    """vLLM's attention on CPUs takes no heads of 8, as the tiny model has: the first request fails."""
    pytest.importorskip("vllm")
    models = [open_model(str(tiny_base))] * 2
    said: list[str] = []
    found = check_models(models[0], models[1], suite, CheckOptions(), ReplyStore(tmp_path), said.append)
    assert found.check.verdict == "pass"
    assert any("transformers for all, since vLLM did not start" in line for line in said)


def run_example(folder: Path, candidate: Path, baseline: Path, suite: str | Path) -> dict[str, str]:
    """Run the example of a gate in pytest as a user does; returns what became of each score's test."""
    example = shared_folder("examples") / "check" / "test_merge.py"
    environment = os.environ | {
        **{"CANDIDATE": str(candidate), "BASELINE": str(baseline), "SUITE": str(suite)},
        **{"ENGINE": "transformers", "XDG_CACHE_HOME": str(folder), "PYTEST_ADDOPTS": ""},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "pytest", "-v", "-c", os.devnull, "-p", "no:cacheprovider", str(example)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    return dict(re.findall(r"\[(\w+)\] ([A-Z]+)", done.stdout))


@pytest.fixture(scope="module")
def lost_and_gained(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, damaged: Path, suite: Suite
) -> Path:
    """Items that the damaged model has lost, and as many that it has gained: of both, its score stays."""
    folder = tmp_path_factory.mktemp("lost_and_gained")
    evaluator = Evaluator(suite)
    with closing(Pool(open_model(str(damaged)), ENGINE, evaluator, None)) as pool:
        replies = pool.measured(Job("test", evaluator.documents("all"))).measurement.items["response"]
    before = [item.answer for item in suite.items["items.jsonl"]]
    for name, answers in (("lost", before), ("gained", replies)):
        lines = [
            json.dumps({"prompt": f"Count to {i}.", "answer": answer}) for i, answer in enumerate(answers)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def scores_of(**files: list[str]) -> dict[str, Any]:
    """Return objectives by name, with a task for each file of items."""
    how = {"scorer": "exact", "max_new_tokens": 4}
    return {
        score: {"margin": 0.1, "tasks": [{"items": f"{name}.jsonl", **how} for name in names]}
        for score, names in files.items()
    }


def test_the_pytest_example_judges_each_score_and_its_tasks(
    tiny_base: Path, damaged: Path, lost_and_gained: Path, tmp_path: Path
) -> None:
    scores = scores_of(better=["gained"], worse=["lost"], unclear=["items"], even=["lost", "gained"])
    mixed = write_suite(lost_and_gained, ["?"] * 12, objectives=scores)
    assert run_example(tmp_path, damaged, tiny_base, mixed.path) == {
        "better": "PASSED",
        "worse": "FAILED",
        "unclear": "SKIPPED",
        "even": "FAILED",  # one of its tasks has
    }


def test_a_check_fails_where_only_a_task_does(tiny_base: Path, damaged: Path, lost_and_gained: Path) -> None:
    both = write_suite(lost_and_gained, ["?"], objectives=scores_of(counting=["lost", "gained"]))
    options = ["--suite", both.path, "--engine", "transformers", "--store", lost_and_gained / "store"]
    done = mergetune("check", damaged, "--baseline", tiny_base, *options, "--json")
    verdicts = {row["name"]: row["verdict"] for row in json.loads(done.stdout)["rows"]}
    assert (done.returncode, verdicts["counting"]) == (1, "pass"), verdicts


def test_the_pytest_example_takes_the_name_of_a_preset(tmp_path: Path) -> None:
    found = run_example(tmp_path, tmp_path / "absent", tmp_path / "absent", "taskmaster_deploy")
    assert [*found.values()] == ["ERROR"] * 4  # a test for each score, of models that are not there


def test_the_workflow_calls_check_as_it_is() -> None:
    file = shared_folder("examples") / "check" / "github-actions.yml"
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    (command,) = [step["run"] for step in steps if "mergetune check" in step.get("run", "")]
    documented = mergetune("check", "--help").stdout
    assert all(word in documented for word in command.split() if word.startswith("--"))
    (shown,) = [step for step in steps if "summary.md" in step.get("run", "")]
    assert "hashFiles('check/summary.md') != ''" in shown["if"]  # an error leaves none
    assert workflow["permissions"] == {"contents": "read", "checks": "write"}


def test_a_judge_without_a_verdict_on_one_reply_does_not_keep_the_gate_from_its_verdict(
    tiny_base: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGETUNE_CACHE", str(tmp_path / "cache"))
    with plain_server(silent_on(question(7))) as url:
        judged = read_suite(write_judged_suite(tmp_path / "suite", url, 40))
        said: list[str] = []
        whole = checked(damaged, tiny_base, judged, tmp_path / "store", said)
        early = checked(damaged, tiny_base, judged, tmp_path / "store", is_fast=True)
    both = whole.candidate.merge(whole.baseline, on=ITEM_KEYS, suffixes=("", "_baseline"))
    (row,) = whole.check.rows
    differences = (both["score"] - both["score_baseline"]).dropna()
    assert row.n_items == len(differences) == 39
    assert row.difference == pytest.approx(differences.mean())
    assert row.verdict in ("pass", "fail", "inconclusive")
    assert len(early.check.rows) == 1
    for found in (whole, early):
        (warning,) = found.check.warnings
        assert "`tone:items.jsonl`: the judge gave no verdict on 2 replies" in warning
        assert "'Question 7?'" in warning
        assert "no verdict on 2 replies" in as_markdown(found.check)
    assert sum("the judge gave no verdict on 1 reply (40 items were scored)" in line for line in said) == 3
    for name, frame in (("candidate", whole.candidate), ("baseline", whole.baseline)):
        frame.to_parquet(tmp_path / f"{name}.parquet")
    files = [tmp_path / f"{name}.parquet" for name in ("candidate", "baseline")]
    assert all(re.fullmatch(r"So. \(score: [1-5]\)|", reason) for reason in whole.candidate["reason"])
    for flip in whole.check.flips:
        assert f"(score: {1 + 4 * flip.candidate_score:.0f})" in flip.candidate_reason
    stored = check_stored(files[0], files[1], judged, CheckOptions()).check
    assert stored.flips == whole.check.flips
    assert stored.warnings == tuple(
        text.replace(str(damaged), str(files[0])) for text in whole.check.warnings
    )
    assert stored.rows[0].difference == row.difference
    done = mergetune("check", "--suite", judged.path, "--from", files[0], "--from", files[1])
    assert "warning: `tone:items.jsonl`: the judge gave no verdict on 2" in " ".join(done.stderr.split())


def test_a_measurement_of_an_earlier_version_counts_no_missing_verdicts(
    tiny_base: Path, suite: Suite, tmp_path: Path
) -> None:
    found = checked(tiny_base, tiny_base, suite, tmp_path / "store", has_noise_floor=False)
    file = tmp_path / "baseline.parquet"
    found.baseline.drop(columns=["unjudged", "reason"]).to_parquet(file)
    assert check_stored(file, file, suite, CheckOptions()).check.verdict == "pass"
