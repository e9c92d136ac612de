"""Studies on a stack: a search by the stack's own layers, the report, and the stack against its parents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers import build_llama, fine_tune, mergetune
from mergetune.results.run import Run
from mergetune.results.run_dir import RunDir
from mergetune.space.recipe import MergeRecipe
from mergetune.space.stack import Stack
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.models import find_model
from studies import run, write_study

SCALES: dict[str, Any] = {
    "description": "What a copied layer adds, from nothing to as much as the layer itself.",
    "method": "passthrough",
    "groups": [
        {"name": "copy", "match": r"layers\.[23]\..*(o_proj|down_proj)", "scale": {"low": 0, "high": 1}},
        {"name": "rest", "match": r"^(?!.*layers\.[23]\..*(o_proj|down_proj))", "scale": 1},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked")
    build_llama(folder / "base")
    for seed, name in enumerate("ab", start=1):
        fine_tune(folder / "base", folder / name, seed, std=0.002)
        stack_of(folder, f"deep-{name}", name)
    stack_of(folder, "deep-base", "base")
    return folder


def stack_of(folder: Path, name: str, model: str) -> None:
    slots = [{"model": model, "layers": [0, 2]}] * 2
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"stack": slots}))


def test_scales_of_copied_layers_are_searched(folder: Path, tmp_path: Path) -> None:
    stack = yaml.safe_load((folder / "deep-a.yaml").read_text())
    slots = [{**slot, "model": str(folder / slot["model"])} for slot in stack["stack"]]
    (tmp_path / "scales.yaml").write_text(yaml.safe_dump(SCALES))
    study = write_study(
        tmp_path, folder / "base", {}, search_space="scales.yaml", allow_flat_objectives=False
    )
    data = yaml.safe_load(study.read_text()) | {
        "base": {"stack": slots},
        "experts": {"deep": {"stack": slots}},
    }
    study.write_text(yaml.safe_dump(data))
    assert "can only be scaled" in run(study, tmp_path / "run")
    found = Run(tmp_path / "run")
    points = [each.params for each in found.candidates if each.role == "trial"]
    assert len({point["scale.copy"] for point in points if point}) == 3
    assert RunDir(tmp_path / "run").study.base == Stack.model_validate({"stack": slots})
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "a[0:2] + a[0:2]" in page
    best = MergeRecipe.read(tmp_path / "run" / "best" / "recipe.yaml")
    assert isinstance(best.base.path, Stack)
    run(study, tmp_path / "run")  # goes on, and has nothing to do
    assert len(Run(tmp_path / "run").candidates) == len(found.candidates)


def test_slopes_lead_the_search_of_stacked_fine_tunes(folder: Path, tmp_path: Path) -> None:
    experts = {name: folder / f"deep-{name}.yaml" for name in "ab"}
    study = write_study(tmp_path, folder / "deep-base.yaml", experts, warm_start="gradient")
    run(study, tmp_path / "run")
    found = Run(tmp_path / "run")
    assert any(each.role == "slopes" for each in found.candidates)
    assert {"base", "expert-a", "expert-b"} <= {each.name for each in found.candidates}


def test_a_stack_is_checked_against_its_parent_and_merged_from_the_command_line(
    folder: Path, tmp_path: Path
) -> None:
    suite = write_study(tmp_path, folder / "base", {}).with_name("suite.yaml")
    stack, parent = folder / "deep-a.yaml", folder / "a"
    done = mergetune("eval", stack, "--suite", suite, "--engine", "transformers")
    assert done.returncode == 0, done.stderr
    done = mergetune(
        "check", stack, "--baseline", parent, "--suite", suite, "--engine", "transformers", "--json"
    )
    assert done.returncode in (0, 1, 2), done.stderr
    assert json.loads(done.stdout)
    done = mergetune("inspect", folder / "deep-base.yaml", f"a={stack}", f"b={folder / 'deep-b.yaml'}")
    assert done.returncode == 0, done.stderr
    done = mergetune("soup", tmp_path / "soup", stack, folder / "deep-b.yaml")
    assert done.returncode == 0, done.stderr
    assert mergetune("merge", stack, tmp_path / "out").returncode == 0
    written, wanted = Checkpoint(tmp_path / "out"), Checkpoint(find_model(str(stack), folder))
    assert all(torch.equal(written.view(name), wanted.view(name)) for name in wanted.names)
