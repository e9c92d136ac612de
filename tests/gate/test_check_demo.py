"""The regression gate on the demo: real merges of SmolLM2, through the command as CI calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import mergetune
from mergetune.files.library import shared_folder

RECIPES = shared_folder("examples") / "taskmaster" / "recipes"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all: each merge is measured once."""
    return tmp_path_factory.mktemp("store")


def check(
    candidate: str, baseline: str, suite: str | Path, store: Path, *options: str
) -> tuple[int, dict[str, Any]]:
    """Check one of the demo's recipes against another."""
    models = [RECIPES / f"{candidate}.yaml", "--baseline", RECIPES / f"{baseline}.yaml"]
    engine = ["--engine", "transformers", "--batch-size", "50", "--store", store]
    done = mergetune("check", *models, "--suite", suite, *engine, "--json", *options)
    assert done.returncode <= 2, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_tuned_merge_passes_against_the_uniform_average(store: Path) -> None:
    code, found = check("tuned", "average", "taskmaster_deploy", store)
    assert (code, found["verdict"]) == (0, "pass"), found
    assert {row["name"]: row["improved"] for row in found["rows"]}["persona"]
    assert found["warnings"] == []


def test_a_merge_with_one_layer_group_negated_fails(store: Path) -> None:
    code, found = check("damaged", "tuned", "taskmaster_deploy", store, "--fast")
    assert (code, found["verdict"]) == (1, "fail"), found
    assert found["saving"]["n_measured"] < found["saving"]["n_items"] / 2


def test_thirty_items_are_inconclusive(store: Path, tmp_path: Path) -> None:
    deployed = shared_folder("evals") / "taskmaster_deploy.yaml"
    suite = yaml.safe_load(deployed.read_text(encoding="utf-8"))
    for score in (*suite["objectives"].values(), *suite["guards"].values()):
        for task in score["tasks"]:
            lines = (deployed.parent / task["items"]).read_text(encoding="utf-8").splitlines()
            task["items"] = Path(task["items"]).name
            (tmp_path / task["items"]).write_text("\n".join(lines[:10]), encoding="utf-8")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    code, found = check("tuned", "average", tmp_path / "small.yaml", store, "--split", "all")
    assert (code, found["verdict"], found["n_items"]) == (2, "inconclusive", 30), found
