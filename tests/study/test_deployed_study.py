"""A study that deploys the recommended merge quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from helpers import mergetune
from mergetune.errors import MergetuneError
from mergetune.report.data import gather
from mergetune.results.run_dir import RunDir
from quantizing import QUANTIZER, error_of, needs_quantizer
from studies import run, write_study

ENGINE = ("--engine", "transformers")


@pytest.fixture(scope="module")
def finished(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, str]:
    folder = tmp_path_factory.mktemp("deployed")
    deploy = {"quantize": "int8", "python": QUANTIZER}
    study = write_study(folder, tiny_base, tiny_experts, deploy=deploy, budget={"trials": 1})
    return RunDir(folder / "run"), run(study, folder / "run")


@needs_quantizer
def test_what_merging_and_what_quantizing_lose_is_measured_on_held_out_items(
    finished: tuple[RunDir, str],
) -> None:
    found, printed = finished
    page, data = (found.path / "report" / "index.html").read_text(), gather(found)
    form = data.forms["quantized"]
    assert data.recommendation is not None
    assert (form.record.of, form.record.split) == (data.recommendation.name, "holdout")
    assert "quantized 14 linear layers" in form.record.summary[0]
    assert {loss.metric.name for loss in form.losses} == {"words", "parity", "calm"}
    for loss in form.losses:
        before = form.merging[loss.metric.name]
        assert loss.other == before.own  # the merge stands between
        assert loss.difference == pytest.approx(loss.own.value - loss.other.value)
        assert before.difference == pytest.approx(before.own.value - before.other.value)
        assert loss.interval.lower <= loss.difference <= loss.interval.upper
        for each in (loss, before):
            assert each.text in printed
            assert each.text in page
    assert form.merging["words"].against in ("expert-a", "expert-b")
    assert form.merging["calm"].against == "base"
    assert error_of(found.path / "quantized", found.path / "best", "int8") < 0.1


@needs_quantizer
def test_check_says_what_quantizing_changed_and_asks_nothing_again(
    finished: tuple[RunDir, str], tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    found, _ = finished
    models = (found.path / "quantized", "--baseline", tiny_experts["a"])
    how = ("--suite", found.study.suite, "--no-noise-floor", *ENGINE, "--out", tmp_path)
    done = mergetune("check", *models, "--unquantized", found.path / "best", *how)
    assert done.returncode in (0, 1, 2), done.stderr
    for model in ("quantized", "best"):  # both were asked in the study
        assert f"{found.path / model}: 0 items measured" in done.stderr
    assert "by quantizing" in done.stdout
    rows = {
        row["score_name"]: row for row in json.loads((tmp_path / "check.json").read_text())["attributions"]
    }
    whole = {row["name"]: row for row in json.loads((tmp_path / "check.json").read_text())["rows"]}
    losses = {loss.metric.name: loss for loss in gather(found).forms["quantized"].losses}
    for name, row in rows.items():
        assert row["before"] + row["quantizing"] == pytest.approx(whole[name]["difference"])
        assert row["quantizing"] == pytest.approx(losses[name].difference)
    assert set(rows) == set(losses)
    for file in ("summary.md", "index.html"):
        assert "by quantizing" in (tmp_path / file).read_text()
    assert len(pd.read_parquet(tmp_path / "unquantized.parquet")) == len(
        pd.read_parquet(tmp_path / "candidate.parquet")
    )
    fast = mergetune("check", *models, "--unquantized", found.path / "best", *how, "--fast")
    assert fast.returncode == 3
    assert "--fast may stop before" in fast.stderr


def test_a_study_that_could_not_quantize_is_refused_before_any_work(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    deploy = {"quantize": "int8", "python": "nowhere/python"}
    study = write_study(tmp_path, tiny_base, tiny_experts, deploy=deploy)
    with pytest.raises(MergetuneError, match=r"`deploy\.python` must be .*/nowhere/python cannot be run"):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run" / "candidates").exists()
