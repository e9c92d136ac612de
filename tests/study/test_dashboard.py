"""What optuna-dashboard finds in a study's journal and in its mirror, asked as its pages ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
import yaml
from optuna.storages import BaseStorage, RDBStorage

from mergetune.results.run_dir import RunDir
from mergetune.study.search import journal
from studies import run, write_study

dashboard = pytest.importorskip("optuna_dashboard")


def asked(storage: BaseStorage, path: str) -> Any:
    """Return what the dashboard answers."""
    environ: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environ)
    return json.loads(b"".join(dashboard.wsgi(storage)(environ, lambda *_: None)))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> RunDir:
    """A study whose guard some candidates break: the better the words, the worse is the guard."""
    folder = tmp_path_factory.mktemp("dashboard")
    study = write_study(folder, tiny_base, tiny_experts, storage="sqlite:///studies.db", budget={"trials": 4})
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    words = suite["objectives"]["words"]["tasks"][0] | {"items": "./words.jsonl"}
    suite["guards"] = {"few words": {"margin": 0.3, "direction": "minimize", "tasks": [words]}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    run(study, folder / "run")
    return RunDir(folder / "run")


@pytest.mark.parametrize("kind", ["journal", "mirror"])
def test_names_and_constraints_are_shown(finished: RunDir, kind: str) -> None:
    storage = (
        journal(finished.path / "study.journal")
        if kind == "journal"
        else RDBStorage(f"sqlite:///{finished.path.parent}/studies.db")
    )
    (study,) = asked(storage, "/api/studies")["study_summaries"]
    assert study["study_name"] == ("mergetune" if kind == "journal" else finished.watched_as())
    found = asked(storage, f"/api/studies/{study['study_id']}")
    assert found["objective_names"] == list(finished.study.suite_config.objectives)
    is_feasible = {}
    for trial in found["trials"]:
        attributes = {each["key"]: each["value"] for each in trial["user_attrs"]}
        assert float(attributes["guard.few words"]) == trial["constraints"][0]
        is_feasible[attributes["candidate"]] = all(excess <= 0 for excess in trial["constraints"])
    scores = finished.all_scores("search")
    assert is_feasible == {name: own["few words"].value <= 0.3 for name, own in scores.items()}
    assert set(is_feasible.values()) == {True, False}
