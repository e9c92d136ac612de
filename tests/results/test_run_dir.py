"""Run directories: cut at any moment, broken, gone on with, and of another study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.files.library import find
from mergetune.measuring.reply_store import ReplyStore
from mergetune.results.config import Budget
from mergetune.results.run_dir import Candidate, RunDir, StudyRecord
from synthetic_run import Plan, write_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "run", Plan(n_trials=2, n_items=8, noise=0.1))


def claim(run: RunDir, record: StudyRecord) -> None:
    with run.claim(record):
        pass


def test_a_cut_before_anything_was_kept_leaves_a_directory_that_can_be_used(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = RunDir(tmp_path / "cut")
    make = Path.mkdir

    def stop(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if path.name == "candidates":
            raise KeyboardInterrupt
        make(path, mode, parents, exist_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", stop)
        with pytest.raises(KeyboardInterrupt):
            claim(cut, run.study)
    claim(cut, run.study)
    early = tmp_path / "early"
    early.mkdir()
    (early / "lock").touch()
    (early / "record.json.4711.tmp").write_text('{"base')
    claim(RunDir(early), run.study)
    (early / "record.json").unlink()
    with pytest.raises(MergetuneError, match="holds other files"):
        claim(RunDir(early), run.study)


def test_without_responses_the_rest_of_a_measurement_is_the_same(run: RunDir) -> None:
    whole, rest = (run.measurement("base", "search", responses=wanted) for wanted in (True, False))
    assert whole is not None
    assert rest is not None
    assert list(rest.columns) == ["score_name", "task", "item", "score"]
    pd.testing.assert_frame_equal(rest, whole.drop(columns="response"))


def test_a_record_that_changes_is_seen_at_once(run: RunDir) -> None:
    assert run.study.budget.trials != 7
    claim(run, run.study.model_copy(update={"budget": Budget(trials=7)}))
    assert run.study.budget.trials == 7


def test_another_order_of_experts_or_objectives_is_another_study(run: RunDir) -> None:
    """Trials hold their values in the order of the objectives, and experts are summed in theirs."""
    study = run.study
    turned = {"experts": dict(reversed(study.experts.items()))}
    with pytest.raises(MergetuneError, match=r"order changed: experts\.persona is where experts\.tools was"):
        claim(run, study.model_copy(update=turned))
    suite = study.suite_config
    config = suite.model_copy(update={"objectives": dict(reversed(suite.objectives.items()))})
    with pytest.raises(MergetuneError, match=r"order changed: suite_config\.objectives\.persona.* is where"):
        claim(run, study.model_copy(update={"suite_config": config}))
    claim(run, study)


def test_other_items_are_refused_and_the_same_ones_are_not(run: RunDir) -> None:
    items = run.items()
    run.write_items(items.sample(frac=1, random_state=0))
    for column in ("item", "split", "prompt"):
        other = items.copy()
        other.loc[:2, column] = "another"
        with pytest.raises(MergetuneError, match=r"items have changed .* 3 are gone .* 3 are new"):
            run.write_items(other)
    assert set(run.items()["item"]) == set(items["item"])


def test_items_of_conversations_are_the_same_when_a_run_goes_on(run: RunDir) -> None:
    evaluator = Evaluator(read_suite(find("evals", "taskmaster", Path())))
    items = evaluator.items()
    assert items["earlier"].str.len().max() > 2  # a list that is not empty
    (run.path / "items.parquet").unlink()
    for known in (items, items.drop(columns=["system", "earlier"])):
        run.write_items(known)
        run.write_items(evaluator.items())


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("record.json", lambda run: run.study),
        ("candidates/base.json", RunDir.candidates),
        ("candidates/base.json", lambda run: run.candidate("base")),
        ("candidates/base.search.parquet", lambda run: run.scores("base", "search")),
        ("holdout.json", RunDir.holdout_uses),
        ("noise.parquet", RunDir.noise),
        ("items.parquet", RunDir.items),
        ("warnings.json", lambda run: run.read_json("warnings.json")),
    ],
)
def test_a_broken_file_is_named_with_the_remedy(
    run: RunDir, file: str, read: Callable[[RunDir], object]
) -> None:
    read(run)
    path = run.path / file
    path.write_bytes(path.read_bytes()[:-20])
    remedy = "study.yaml beside it" if file == "record.json" else "Delete it and run again"
    with pytest.raises(MergetuneError, match=rf"{file}: cannot be read .*{remedy}"):
        read(run)


def test_a_broken_file_of_the_store_is_named_too(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path)
    store.add("model", {"a": "yes"})
    (tmp_path / "model.parquet").write_text("no parquet")
    with pytest.raises(MergetuneError, match=r"model\.parquet: cannot be read .*Delete it"):
        store.read("model")


def test_attempts_outlast_the_process_and_belong_to_one_recipe(run: RunDir) -> None:
    run.begin_attempt("search.x", "one")
    run.add_fault("search.x", "one", "the engine broke")
    run.begin_attempt("search.x", "one")
    found = RunDir(run.path).attempts("search.x", "one")
    assert (found.begun, found.faults) == (2, ("the engine broke",))
    assert "the engine broke; once the process ended in the middle of it" in found.reason
    assert run.attempts("search.x", "another").begun == 0
    run.take_back_attempt("search.x", "one")
    assert run.attempts("search.x", "one").begun == 1
    run.forget_attempts("search.x")
    assert run.attempts("search.x", "one").begun == 0


def test_the_second_base_and_the_final_slopes_count_as_spent(run: RunDir) -> None:
    before = run.spent_s()
    run.add_seconds("noise", 3.0)
    run.add_seconds("sensitivity", 4.0)
    run.add_seconds("sensitivity", 5.0)
    assert RunDir(run.path).spent_s() == pytest.approx(before + 12.0)


def test_points_of_slopes_of_an_earlier_version_are_named(run: RunDir) -> None:
    points = [{"lambda.all.a": 0.5}, {"lambda.all.a": 0.7}]
    run.write_json(
        "warm_start.json", {"points": points, "reason": None, "full_evaluations": 2.9, "seconds": 1.0}
    )
    found = run.warm_start()
    assert found is not None
    assert found.points == {"gradient-1": points[0], "gradient-2": points[1]}
    assert found.is_over


def test_a_point_of_an_earlier_version_is_read_as_one_of_its_space(run: RunDir) -> None:
    own = run.candidates()[0].model_dump(mode="json", by_alias=True)
    del own["space"]
    around = {"toward.1": 0.5, "times.all.a": 1.0}
    assert Candidate.model_validate(own).space == "search_space"
    assert Candidate.model_validate({**own, "params": around}).space == "front"
