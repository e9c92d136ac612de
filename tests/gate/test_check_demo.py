"""The regression gate on the demo: real merges of SmolLM2, through the command as CI calls it."""

from __future__ import annotations

import json
import shutil
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


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite of the deployment, without the items that need both skills, and with fewer of each one."""
    return write_suite(tmp_path_factory.mktemp("deployed"), 60, 125)


def write_suite(folder: Path, n_items: int, n_of_guard: int, margin: float = 0.1) -> Path:
    shipped = shared_folder("evals") / "taskmaster_deploy.yaml"
    suite = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    del suite["objectives"]["joint"]
    for score in suite["objectives"].values():
        score["margin"], score["tasks"][0]["limit"] = margin, n_items
    suite["guards"]["general"]["tasks"][0]["limit"] = n_of_guard
    shutil.copytree(shipped.parent / "taskmaster", folder / "taskmaster")
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    return folder / "suite.yaml"


def test_the_tuned_merge_passes_against_the_uniform_average(store: Path, tmp_path: Path) -> None:
    """The margin is wide: sums of bfloat16, and with them some calls, differ between processors."""
    code, found = check("tuned", "average", write_suite(tmp_path, 60, 125, margin=0.2), store)
    assert (code, found["verdict"]) == (0, "pass"), found
    assert {row["name"]: row["improved"] for row in found["rows"]}["persona"]
    assert found["warnings"] == []


def test_a_merge_with_one_layer_group_negated_fails(deployed: Path, store: Path) -> None:
    code, found = check("damaged", "tuned", deployed, store, "--fast")
    assert (code, found["verdict"]) == (1, "fail"), found
    assert found["saving"]["n_measured"] < 0.8 * found["saving"]["n_items"]


def test_a_few_items_are_inconclusive(store: Path, tmp_path: Path) -> None:
    code, found = check("tuned", "average", write_suite(tmp_path, 14, 14), store)
    assert (code, found["verdict"]) == (2, "inconclusive"), found
