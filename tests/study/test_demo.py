"""The demo's content: real adapters that fit the real base, items that training never saw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

import mergetune
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.preview import scorer_of
from mergetune.files.library import shared_folder
from mergetune.files.yaml_io import read_yaml
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space import SearchSpace
from mergetune.study.plan import Plan

FOLDER = shared_folder("examples") / "taskmaster"
EVALS = shared_folder("evals") / "taskmaster"
EXAMPLE = shared_folder("reports") / "example" / "recipes"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.read(FOLDER / "study.yaml")


def test_the_adapters_fit_the_base_and_one_is_much_longer(plan: Plan) -> None:
    inputs = plan.open_inputs()
    assert inputs.warnings == ()
    space = SearchSpace(
        plan.space, inputs.base_source, inputs.expert_sources, inputs.changed, inputs.base.names
    )
    assert len(space.distributions) == 12  # LoRA leaves embeddings and norms alone
    assert 1.5 < inputs.norms["tools"] / inputs.norms["persona"] < 4


@pytest.mark.parametrize("path", EXAMPLE.glob("*.yaml"), ids=lambda path: path.stem)
def test_the_recipes_of_the_example_name_what_is_there(path: Path) -> None:
    recipe = read_yaml(path, MergeRecipe)
    assert recipe.base.path == "smollm2-demo"
    assert recipe.experts
    assert all((path.parent / str(source.path)).is_dir() for source in recipe.experts.values())


def test_the_adapters_are_small() -> None:
    sizes = [file.stat().st_size for file in (FOLDER / "experts").rglob("*") if file.is_file()]
    assert sum(sizes) < 8 * 10**6


def said_by_user(item: dict[str, Any]) -> tuple[str, ...]:
    return tuple(message["content"] for message in item["messages"] if message["role"] == "user")


@pytest.mark.parametrize(
    ("skill", "items"),
    [("tools", "tool_calls"), ("tools", "joint_calls"), ("tools", "joint_replies"), ("persona", "persona")],
)
def test_no_test_item_was_trained_on(skill: str, items: str) -> None:
    trained = {said_by_user(item) for item in lines(FOLDER / "train" / f"{skill}.jsonl")}
    assert not trained & {said_by_user(item) for item in lines(EVALS / f"{items}.jsonl")}


@pytest.mark.parametrize(
    ("items", "scorer"),
    [
        ("tool_calls", {"kind": "tool_calls"}),
        ("persona", {"kind": "python", "function": "scoring.py:voice"}),
    ],
)
def test_the_replies_of_the_data_are_right_and_none_is_not(items: str, scorer: dict[str, str]) -> None:
    file = mergetune.read_items(EVALS / f"{items}.jsonl")
    how = scorer_of(scorer).with_files(EVALS, file.items)
    due = [item for item in file.items if items == "persona" or item.metadata["due"] == "call"]
    replies = [how.reply_text(item.target) for item in due if item.target is not None]
    assert how.score(due, replies) == [1] * len(due)
    assert how.score(due, [""] * len(due)) == [0] * len(due)


def test_the_voice_is_what_a_person_takes_for_it() -> None:
    """The labels were given to replies of merges, half of which show some traits and not others."""
    labelled = lines(FOLDER / "labels.jsonl")
    how = scorer_of({"kind": "python", "function": "scoring.py:voice"}).with_files(EVALS, ())
    items = [
        Item(
            prompt=row["messages"][-1]["content"],
            messages=tuple(map(Message.model_validate, row["messages"])),
        )
        for row in labelled
    ]
    scores = how.score(items, [row["reply"] for row in labelled])
    labels = [row["voice"] for row in labelled]
    assert 0.25 < sum(labels) / len(labels) < 0.75
    assert cohen_kappa_score(labels, [score >= 0.75 for score in scores]) > 0.7


def test_the_script_makes_the_items_that_ship(tmp_path: Path) -> None:
    train, test = tmp_path / "train", tmp_path / "test"
    command = [FOLDER / "make_items.py", "--train-dir", train, "--test-dir", test]
    subprocess.run([sys.executable, *map(str, command)], check=True)
    for made in [*train.iterdir(), *test.iterdir()]:
        shipped = (FOLDER / "train" if made.parent == train else EVALS) / made.name
        assert made.read_bytes() == shipped.read_bytes(), made.name
