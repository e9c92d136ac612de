"""What a run directory keeps of a study, and which study goes on in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import COMMIT, cache_model
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.results.run_dir import RunDir, StudyRecord
from mergetune.study.plan import Plan
from studies import write_study


@pytest.fixture
def study(hub_cache: Path, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path) -> Path:
    """A study of a base and an expert from the Hub, and an expert from a directory."""
    cache_model(hub_cache, "acme/base", tiny_base)
    cache_model(hub_cache, "acme/a", tiny_experts["a"])
    experts = {"a": Path("acme/a"), "b": tiny_experts["b"]}
    return write_study(tmp_path / "study", Path("acme/base"), experts)


def record(study_file: Path) -> StudyRecord:
    plan = Plan.read(study_file)
    return plan.record(plan.open_inputs(), Evaluator(plan.suite).rules)


def claim(study: StudyRecord, run: Path) -> None:
    with RunDir(run).claim(study):
        pass


def test_hub_ids_are_kept_pinned(study: Path, tiny_experts: dict[str, Path], tmp_path: Path) -> None:
    claim(record(study), tmp_path / "run")
    for kept in (RunDir(tmp_path / "run").study, Plan.read(tmp_path / "run" / "study.yaml").config):
        assert kept.base == f"acme/base@{COMMIT}"
        assert kept.experts == {"a": f"acme/a@{COMMIT}", "b": str(tiny_experts["b"])}


def test_a_study_goes_on_where_the_cache_is_elsewhere(
    study: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(record(study), tmp_path / "run")
    hub_cache.rename(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    claim(record(study), tmp_path / "run")
    claim(record(tmp_path / "run" / "study.yaml"), tmp_path / "run")


def test_a_run_that_kept_places_in_the_cache_goes_on(study: Path, hub_cache: Path, tmp_path: Path) -> None:
    claim(record(study), tmp_path / "run")
    file = tmp_path / "run" / "record.json"
    old = json.loads(file.read_text())
    old["base"] = str(hub_cache / "models--acme--base" / "snapshots" / COMMIT)
    old["experts"]["a"] = str(hub_cache / "models--acme--a" / "snapshots" / COMMIT)
    file.write_text(json.dumps(old))
    claim(record(study), tmp_path / "run")
    assert json.loads(file.read_text())["base"] == f"acme/base@{COMMIT}"


def test_a_hub_id_that_moved_on_is_refused_with_both_commits(
    study: Path, hub_cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    claim(record(study), tmp_path / "run")
    cache_model(hub_cache, "acme/base", tiny_base, commit="e" * 40)
    with pytest.raises(MergetuneError, match=f"was 'acme/base@{COMMIT}', is 'acme/base@{'e' * 40}'"):
        claim(record(study), tmp_path / "run")
    claim(record(tmp_path / "run" / "study.yaml"), tmp_path / "run")  # which is pinned
