"""Studies that also write the recommended merge as an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from helpers import fine_tune, merge_with_peft, mergetune, train_adapter
from mergetune.errors import MergetuneError
from mergetune.report.data import gather
from mergetune.report.losses import form_losses
from mergetune.results.config import ExportConfig, StudyConfig, read_study
from mergetune.results.run_dir import RunDir
from mergetune.weights.checkpoint import Checkpoint
from studies import run, write_study


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that change what the tiny model says."""
    folder = tmp_path_factory.mktemp("adapters")
    how: dict[str, Any] = {"r": 4, "lora_alpha": 256}
    modules = {"a": ["q_proj", "up_proj", "down_proj"], "b": ["v_proj", "down_proj"]}
    return {
        name: train_adapter(tiny_base, folder / name, seed=seed, target_modules=modules[name], **how)
        for seed, name in enumerate("ab")
    }


@pytest.fixture(scope="module")
def finished(
    tiny_base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, str]:
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder, tiny_base, adapters, export={"adapter": {"rank": 1}}, budget={"trials": 1})
    return RunDir(folder / "run"), run(study, folder / "run")


def test_the_loss_of_the_adapter_is_measured_on_held_out_items(finished: tuple[RunDir, str]) -> None:
    found, printed = finished
    record, data = found.form("adapter"), gather(found)
    assert record is not None
    assert data.recommendation is not None
    assert (record.of, record.split) == (data.recommendation.name, "holdout")
    assert "relative Frobenius error" in record.summary[0]
    items, full = found.form_items("adapter"), found.measurement(record.of, "holdout")
    assert items is not None
    assert full is not None
    assert set(items["item"]) == set(full["item"])
    losses = data.forms["adapter"].losses
    assert {loss.metric.name for loss in losses} == {"words", "parity", "calm"}
    for loss in losses:
        assert loss.difference == pytest.approx(loss.own.value - loss.other.value)
        assert loss.interval.lower < loss.difference < loss.interval.upper
        assert loss.text in printed
        assert loss.text in (found.path / "report" / "index.html").read_text()
    assert any(loss.difference != 0 for loss in losses)
    assert losses == form_losses(found, "adapter", data.metrics, data.noise.variances if data.noise else {})


def test_what_was_measured_is_what_eval_measures(
    finished: tuple[RunDir, str], tiny_base: Path, tmp_path: Path
) -> None:
    found, _ = finished
    how = (
        "--base",
        tiny_base,
        "--suite",
        found.study.suite,
        "--split",
        "holdout",
        "--engine",
        "transformers",
    )
    done = mergetune("eval", found.path / "adapter", *how, "--out", tmp_path / "out.parquet")
    assert done.returncode == 0, done.stderr
    assert "0 items measured" in done.stderr  # it was asked before
    again, items = pd.read_parquet(tmp_path / "out.parquet"), found.form_items("adapter")
    assert items is not None
    assert again["score"].equals(items["score"])


def test_going_on_asks_nothing_again_and_may_take_another_rank(
    finished: tuple[RunDir, str], tmp_path: Path
) -> None:
    found, printed = finished
    copy = Path(shutil.copytree(found.path, tmp_path / "run"))
    lines = [line for line in printed.splitlines() if line.startswith("adapter")]
    again = run(copy / "study.yaml", copy)
    assert [line for line in again.splitlines() if line.startswith("adapter")] == lines
    study = yaml.safe_load((copy / "study.yaml").read_text()) | {"export": "adapter"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(study))
    assert ": exact." in run(tmp_path / "other.yaml", copy)
    record = RunDir(copy).form("adapter")
    assert record is not None
    assert record.split is None
    assert gather(RunDir(copy)).forms["adapter"].losses == ()
    merged = merge_with_peft(Path(str(found.study.base)), copy / "adapter")
    best = Checkpoint(copy / "best")
    for name in best.names:
        assert (merged[name] - best.view(name)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("models", "changes", "message"),
    [
        ("adapters", {"search_space": "ties_layer_groups"}, "`ties`, with these options, is no sum"),
        ("full", {}, "`a` adds no plain product"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused_before_any_work(
    tiny_base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    models: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    experts = adapters
    if models == "full":
        experts = {name: fine_tune(tiny_base, tmp_path / name, i, std=0.01) for i, name in enumerate("ab")}
    study = write_study(tmp_path, tiny_base, experts, export="adapter", **changes)
    with pytest.raises(MergetuneError, match=message):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run" / "candidates").exists()


def test_the_form_alone_is_its_defaults(tiny_base: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, tiny_base, {"a": tiny_base}, export="adapter")
    assert read_study(study).export == ExportConfig.model_validate({"adapter": {}})
    data = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump(data | {"export": "adaptor"}))
    with pytest.raises(MergetuneError, match=r"`export\.adaptor`: unknown key\. Did you mean `adapter`"):
        read_study(study)
    assert StudyConfig.model_validate(data | {"export": None}).export is None
