"""A study in MLflow and W&B, read back from what they keep; W&B offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mergetune.errors import MergetuneError
from mergetune.results.run import Run
from mergetune.results.run_dir import RunDir
from mergetune.space.recipe import MergeRecipe
from studies import run, write_study

_UNREACHABLE = {"kind": "mlflow", "tracking_uri": "http://me:pa55@127.0.0.1:9"}


@pytest.fixture
def logged(tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]) -> Any:
    """Return a function that runs the study of a test, which goes on at every call, with these keys."""

    def go_on(**changes: Any) -> str:
        return run(write_study(tmp_path, tiny_base, tiny_experts, **changes), tmp_path / "run")

    return go_on


class Tracked:
    """What an MLflow store holds of the study in `folder`: the parent run, and the children by candidate."""

    def __init__(self, folder: Path) -> None:
        mlflow = pytest.importorskip("mlflow")
        self.client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        experiment = self.client.get_experiment_by_name("merges")
        runs = self.client.search_runs([experiment.experiment_id])
        (self.parent,) = (each for each in runs if "mergetune.study" in each.data.tags)
        others = [each for each in runs if each is not self.parent]
        assert {each.data.tags["mlflow.parentRunId"] for each in others} == {self.parent.info.run_id}
        self.children = {each.info.run_name: each for each in others}
        assert len(self.children) == len(others), "each candidate is there once"

    def artifact(self, run: Any, name: str) -> Path:
        return Path(self.client.download_artifacts(run.info.run_id, name))


def test_mlflow_has_a_run_for_the_study_and_one_for_each_candidate(
    logged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where its artifacts go
    mlflow = {"kind": "mlflow", "tracking_uri": "sqlite:///mlflow.db", "experiment": "merges"}
    assert "warning: `loggers" not in logged(loggers=mlflow, budget={"trials": 1})
    first = Tracked(tmp_path)
    first.client.update_run(first.children["trial-0001"].info.run_id, status="RUNNING")  # as if cut off
    assert "warning: `loggers" not in logged(loggers=[mlflow], budget={"trials": 2})

    found, out = Tracked(tmp_path), RunDir(tmp_path / "run")
    assert found.parent.info.run_id == first.parent.info.run_id
    assert set(found.children) == {each.name for each in out.candidates()}
    assert {each.info.status for each in (found.parent, *found.children.values())} == {"FINISHED"}
    for candidate in out.candidates():
        child, scores = found.children[candidate.name], out.scores(candidate.name, "search")
        assert scores is not None
        assert child.data.metrics["words"] == scores["words"].value
        assert child.data.metrics["words.stderr"] == scores["words"].stderr
        assert child.data.metrics["guard.calm"] <= 0
        assert {key: float(value) for key, value in child.data.params.items()} == candidate.params
        assert MergeRecipe.read(found.artifact(child, "recipe.yaml")).digest == candidate.recipe.digest
    trial = found.children["trial-0002"]
    items = pd.read_parquet(found.artifact(trial, "trial-0002.search.parquet"))
    assert len(items) == trial.data.metrics["items"]

    result = Run(out.path)
    chosen = result.recommended
    assert found.parent.data.tags["recommended"] == chosen
    assert found.parent.data.params["expert.a"] == out.study.experts["a"]
    assert {name for name, each in found.children.items() if "front" in each.data.tags} == set(result.front)
    estimate = result.scores(str(chosen))["words"]
    assert found.parent.data.metrics["words.low"] == estimate.interval.lower
    assert "holdout.words.high" in found.parent.data.metrics
    assert found.artifact(found.parent, "report/index.html").is_file()
    assert found.artifact(found.parent, "report/pareto.svg").is_file()


def records(file: Path) -> Iterator[Any]:
    """Read a run's file of W&B: 7 bytes, then records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, whole = file.read_bytes()[7:], b""
    offset = 7
    while data:
        left = 32768 - offset % 32768
        if left < 7:  # the rest of a block is empty
            data, offset = data[left:], offset + left
            continue
        _, size, kind = struct.unpack("<IHB", data[:7])
        whole += data[7 : 7 + size]
        data, offset = data[7 + size :], offset + 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))


def steps(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the steps of a run, by their number."""
    found: dict[int, dict[str, Any]] = {}
    (file,) = folder.glob("*.wandb")
    for record in records(file):
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        if items:
            assert items["_step"] not in found, "each candidate is there once"
            found[items["_step"]] = items
    return found


def test_wandb_has_a_step_for_each_candidate(
    logged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # its settings are those of the process
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    for trials in (1, 2):
        printed = logged(loggers=["wandb"], budget={"trials": trials})
        assert "warning: `loggers" not in printed
    wandb.teardown()  # all is on disk
    out = RunDir(tmp_path / "run")
    first, second = folders(tmp_path)
    assert first.name.endswith(out.watched_as())
    assert second.name.endswith(out.watched_as())
    assert len(steps(first)) == len(steps(second)) - 1
    found = steps(second)
    assert {number: step["candidate"] for number, step in found.items()} == {
        each.number: each.name for each in out.candidates()
    }
    for candidate in out.candidates():
        step, scores = found[candidate.number], out.scores(candidate.name, "search")
        assert scores is not None
        assert step["words"] == scores["words"].value
        assert step["words/stderr"] == scores["words"].stderr
        assert step["guard/calm"] <= 0
        params = {f"params/{key}".replace(".", "/"): value for key, value in (candidate.params or {}).items()}
        assert {key: value for key, value in step.items() if key.startswith("params/")} == params

    table = json.loads(next(second.rglob("candidates_*.table.json")).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    result = Run(out.path)
    assert [row["candidate"] for row in rows if row["recommended"]] == [result.recommended]
    assert {row["candidate"]: row["front"] for row in rows if row["front"] is not None} == result.front
    assert next(second.rglob("pareto_*.png")).is_file()
    kept = {each.artifact.name: each.artifact.manifest for each in records(next(second.glob("*.wandb")))}
    assert "index.html" in {entry.path for entry in kept[f"{out.watched_as()}-report"].contents}
    items = {entry.path for entry in kept[f"{out.watched_as()}-items"].contents}
    assert items == {f"{each.name}.search.parquet" for each in out.candidates()}


@pytest.mark.parametrize("logger", [_UNREACHABLE, {"kind": "wandb"}])
def test_a_logger_that_does_not_answer_holds_up_a_new_study_alone(
    logger: dict[str, str], logged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip(logger["kind"])
    if logger["kind"] == "wandb":
        module.teardown()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(MergetuneError, match=f"`loggers: {logger['kind']}` ") as caught:
        logged(loggers=[logger])
    assert "pa55" not in str(caught.value)
    assert not RunDir(tmp_path / "run").candidates()
    logged(budget={"trials": 1})
    printed = logged(loggers=[logger], budget={"trials": 2})
    assert printed.count(f"warning: `loggers: {logger['kind']}`") == 1
    assert "pa55" not in printed
    assert RunDir(tmp_path / "run").candidate("trial-0002") is not None


def test_a_logger_that_is_not_there_is_named_with_those_that_are(logged: Any) -> None:
    with pytest.raises(MergetuneError, match=r"`loggers.0`: must be 'mlflow' or 'wandb'.*mean `mlflow`"):
        logged(loggers=["mlflw"])
    with pytest.raises(MergetuneError, match=r"`loggers.0.projct`: unknown key. Did you mean `project`"):
        logged(loggers=[{"kind": "wandb", "projct": "merges"}])
