"""mergekit's YAML, run by mergekit, gives the weights that we merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from helpers import COMMIT, cache_model
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Score
from mergetune.measuring.model_under_test import LocalModel, open_model
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.merging.merger import Merger
from mergetune.space.recipe import MergeRecipe
from mergetune.study.export import merge_recipe, mergekit_yaml, model_card, write_merged
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.models import DEMO_MODEL, find_model


def recipe(
    inputs: Inputs,
    method: str,
    inner: dict[str, Any],
    outer: dict[str, Any],
    options: dict[str, str] | None = None,
) -> MergeRecipe:
    groups = [
        {"name": "first", "layers": [0, 0], **inner},
        {"name": "rest", "match": r"^(?!model\.layers\.0\.)", **outer},
    ]
    sources = {"base": inputs.base_source, "experts": inputs.expert_sources}
    return MergeRecipe.model_validate({"method": method, **sources, "groups": groups, "options": options})


def both(a: float, b: float) -> dict[str, float]:
    return {"a": a, "b": b}


LAMBDAS = ({"lambda": both(1.3, -0.4)}, {"lambda": both(0.6, 0.7)})
TRIMMED = (
    {"lambda": both(1.3, -0.4), "density": both(0.2, 0.7)},
    {"lambda": both(0.6, 0.7), "density": both(0.5, 0.5)},
)
CRUMBS = tuple({**group, "gamma": both(0.05, 0.0)} for group in TRIMMED)
AMPLIFIED = {"lambda": both(1.0, 1.0), "epsilon": 1e-4, "alpha": 0.4}


@pytest.mark.parametrize(
    ("method", "inner", "outer", "options"),
    [
        ("linear", *LAMBDAS, None),
        ("task_arithmetic", *LAMBDAS, None),
        ("slerp", {"t": 0.25}, {"t": 0.75}, None),
        ("nuslerp", {"t": 0.25}, {"t": 0.75}, None),
        ("nuslerp", {"t": 0.25}, {"t": 0.75}, {"origin": "zero"}),
        ("multislerp", *LAMBDAS, None),
        ("multislerp", *LAMBDAS, {"origin": "zero"}),
        ("karcher", {}, {}, None),
        ("model_stock", {}, {}, None),
        ("ramplus_tl", {**AMPLIFIED, "r": 0.1}, {**AMPLIFIED, "r": 0.9}, None),
        (
            "ties",
            {"lambda": both(1.5, 1.5), "density": both(0.2, 0.7)},
            {"lambda": both(0.5, 0.5), "density": both(0.5, 0.5)},
            None,
        ),
        ("ties", *TRIMMED, {"normalize": "weights"}),
        ("ties", *TRIMMED, {"normalize": "none"}),
        ("breadcrumbs", *CRUMBS, None),
        ("breadcrumbs_ties", *CRUMBS, {"normalize": "none"}),
    ],
)
def test_mergekit_makes_the_same_model(
    inputs: Inputs,
    tmp_path: Path,
    method: str,
    inner: dict[str, Any],
    outer: dict[str, Any],
    options: dict[str, str] | None,
) -> None:
    check_against_mergekit(inputs, recipe(inputs, method, inner, outer, options), tmp_path)


@pytest.mark.parametrize(
    ("method", "inner", "outer"),
    [
        ("nearswap", {"t": 0.001}, {"t": 0.0005}),
        ("passthrough", {"scale": 0.5}, {"scale": 1.5}),
    ],
)
def test_mergekit_makes_the_same_model_of_one_expert(
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    tmp_path: Path,
    method: str,
    inner: dict[str, Any],
    outer: dict[str, Any],
) -> None:
    inputs = open_inputs(tiny_base, {"a": tiny_experts["a"]})
    check_against_mergekit(inputs, recipe(inputs, method, inner, outer), tmp_path)


def check_against_mergekit(inputs: Inputs, wanted: MergeRecipe, folder: Path) -> None:
    text = mergekit_yaml(wanted, inputs)
    assert text is not None
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, str(folder / "theirs"), MergeOptions(quiet=True))
    theirs = Checkpoint(folder / "theirs")
    for name, tensor in Merger(inputs.base, inputs.experts).merge(wanted):
        torch.testing.assert_close(tensor, theirs.tensor(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "coefficients", "options"),
    [
        ("dare_ties", TRIMMED[0], None),
        ("della", {**TRIMMED[0], "epsilon": both(0.1, 0.1)}, {"normalize": "weights"}),
        ("ties", TRIMMED[0], None),
        ("sce", {"select_topk": 0.5}, None),
        ("ram", {"lambda": both(1.0, 0.9), "epsilon": 1e-5}, None),
        ("model_stock", {}, {"granularity": "rows"}),
    ],
)
def test_what_mergekit_cannot_express_is_not_exported(
    inputs: Inputs, method: str, coefficients: dict[str, Any], options: dict[str, str] | None
) -> None:
    assert mergekit_yaml(recipe(inputs, method, coefficients, coefficients, options), inputs) is None


def test_the_card_names_recipe_and_sources(inputs: Inputs, tmp_path: Path) -> None:
    wanted = recipe(inputs, "task_arithmetic", {"lambda": both(0.1, 0.2)}, {"lambda": both(0.3, 0.4)})
    write_merged(tmp_path / "out", wanted, inputs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert wanted.digest in card
    assert str(inputs.experts[1].digest) in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["tags"] == ["merge", "mergetune"]
    assert MergeRecipe.read(tmp_path / "out" / "recipe.yaml") == wanted
    assert (tmp_path / "out" / "mergekit.yaml").exists()


def test_a_models_name_of_itself_sets_nothing_in_the_card(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    hostile = 'acme/x\nlicense: mit\ntags: [owned]\n---\n# "Owned" <script>'
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": hostile}))
    inputs = open_inputs(base, {"a": tiny_experts["a"]})
    sources = inputs.base_source, inputs.expert_sources
    wanted = MergeRecipe.of_one_group("task_arithmetic", *sources, {"lambda": {"a": 0.5}})
    card = model_card("a | b", wanted, inputs, {"s | `t`\n# u": Score(1e24, 2e-5, 3)})
    header = yaml.safe_load(card.split("\n---\n")[0])
    assert header == {
        "base_model": header["base_model"],
        "library_name": "transformers",
        "tags": ["merge", "mergetune"],
    }
    lines = card.splitlines()
    assert "# a \\| b" in lines
    assert "| s \\| 't' # u | 1e+24 | 2e−05 | 3 |" in lines
    assert [line for line in lines if line.startswith("#")] == [
        "# a \\| b",
        "## Sources",
        "## Scores",
        "## Recipe",
    ]


class TestHubIds:
    @pytest.fixture
    def written(
        self,
        hub_cache: Path,
        tiny_base: Path,
        tiny_experts: dict[str, Path],
        tiny_adapter: Path,
        tmp_path: Path,
    ) -> Path:
        """A merge of a base, a fine-tune and an adapter from the Hub, and a fine-tune that is not there."""
        cache_model(hub_cache, "acme/base", tiny_base)
        cache_model(hub_cache, "acme/a", tiny_experts["a"], commit="a" * 40)
        cache_model(hub_cache, "acme/lora", tiny_adapter, commit="f" * 40)
        names = {"a": "acme/a", "b": str(tiny_experts["b"]), "lora": "acme/lora@main"}
        experts = {name: find_model(reference, tmp_path) for name, reference in names.items()}
        inputs = open_inputs(find_model("acme/base", tmp_path), experts)
        lambdas = {"lambda": {"a": 0.5, "b": 0.25, "lora": 1.0}}
        sources = inputs.base_source, inputs.expert_sources
        write_merged(tmp_path / "out", MergeRecipe.of_one_group("task_arithmetic", *sources, lambdas), inputs)
        return tmp_path / "out"

    def test_the_recipe_names_them_pinned(self, written: Path, tiny_experts: dict[str, Path]) -> None:
        recipe = MergeRecipe.read(written / "recipe.yaml")
        assert recipe.base.path == f"acme/base@{COMMIT}"
        assert {name: source.path for name, source in recipe.experts.items()} == {
            "a": f"acme/a@{'a' * 40}",
            "b": str(tiny_experts["b"]),
            "lora": f"acme/lora@{'f' * 40}",
        }

    def test_the_card_names_the_base_as_the_hub_links_it(self, written: Path) -> None:
        card = (written / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["base_model"] == "acme/base"
        assert "snapshots" not in card

    def test_mergekit_reads_ids_and_commits(self, written: Path, tiny_experts: dict[str, Path]) -> None:
        config = MergeConfiguration.model_validate(yaml.safe_load((written / "mergekit.yaml").read_text()))
        assert config.base_model is not None
        assert (config.base_model.model.path, config.base_model.model.revision) == ("acme/base", COMMIT)
        assert config.models is not None
        a, b, lora = (each.model for each in config.models)
        assert (a.model.path, a.model.revision) == ("acme/a", "a" * 40)
        assert (b.model.path, b.model.revision) == (str(tiny_experts["b"]), None)
        assert lora.model == config.base_model.model
        assert lora.lora is not None
        assert (lora.lora.path, lora.lora.revision) == ("acme/lora", "f" * 40)

    def test_the_recipe_gives_the_same_bits_where_the_cache_is_elsewhere(
        self, written: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub_cache.rename(tmp_path / "elsewhere")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "elsewhere"))
        merge_recipe(written / "recipe.yaml", tmp_path / "again")
        assert Checkpoint(tmp_path / "again").digest == Checkpoint(written).digest
        assert (tmp_path / "again" / "recipe.yaml").read_text() == (written / "recipe.yaml").read_text()
        tested = open_model(str(written / "recipe.yaml"))
        assert isinstance(tested, LocalModel)
        assert tested.folder.is_relative_to(tmp_path / "elsewhere")

    def test_a_snapshot_that_is_not_cached_is_named(
        self, written: Path, hub_cache: Path, tmp_path: Path
    ) -> None:
        (hub_cache / "models--acme--a").rename(tmp_path / "gone")
        with pytest.raises(MergetuneError, match=f"`acme/a@{'a' * 40}` .* cannot be fetched"):
            merge_recipe(written / "recipe.yaml", tmp_path / "again")


def test_mergekit_gets_the_demo_model_by_its_directory(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "mergetune" / DEMO_MODEL
    place.parent.mkdir()
    place.symlink_to(tiny_base)
    inputs = open_inputs(place, {"a": tiny_experts["a"]})
    assert inputs.base_source.path == DEMO_MODEL  # mergekit knows no such name
    text = mergekit_yaml(
        recipe(inputs, "task_arithmetic", {"lambda": {"a": 1}}, {"lambda": {"a": 1}}), inputs
    )
    assert text is not None
    assert yaml.safe_load(text)["base_model"] == str(place)


def test_a_recipe_with_relative_paths_is_written_so_that_it_works_from_its_place(
    inputs: Inputs, tiny_base: Path, tmp_path: Path
) -> None:
    wanted = recipe(inputs, "task_arithmetic", {"lambda": both(0.1, 0.2)}, {"lambda": both(0.3, 0.4)})
    data = wanted.model_dump(by_alias=True, exclude_none=True)
    (tmp_path / "models").symlink_to(tiny_base.parent)
    data["base"] = {"path": f"models/{tiny_base.name}"}
    data["experts"]["a"] = {"path": f"./models/{inputs.experts[0].folder.name}"}
    (tmp_path / "relative.yaml").write_text(yaml.safe_dump(data))
    merge_recipe(tmp_path / "relative.yaml", tmp_path / "out")
    assert MergeRecipe.read(tmp_path / "out" / "recipe.yaml") == wanted
    merge_recipe(tmp_path / "out" / "recipe.yaml", tmp_path / "again")
