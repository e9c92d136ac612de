"""Configurations of mergekit-evolve as studies: the same merges are searched, and the same tasks asked."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.evo.genome import ModelGenome

from helpers import mergetune
from imported import read_merge, refusal, take
from mergetune.results.run import Run
from mergetune.space.recipe import LayerGroup, MergeRecipe, Source, assign_groups
from mergetune.space.search_space import SearchSpace
from mergetune.study.plan import Plan
from mergetune.weights.checkpoint import Checkpoint
from studies import run

SEARCHES = sorted((Path(__file__).parent / "searches").glob("*.yaml"))
MADE_UP = {
    "filters": """
        genome:
          models: [a, b, c]
          merge_method: ties
          base_model: base
          layer_granularity: 2
          filters: [self_attn, mlp]
          allow_negative_weights: false
        tasks: [sst2]
    """,
    "normalized": """
        genome: {models: [base, a, b], merge_method: task_arithmetic, base_model: base, normalize: true}
        tasks: [sst2]
    """,
    "outer_base": """
        genome: {models: [a, b], merge_method: dare_ties, base_model: base, layer_granularity: 4}
        tasks: [sst2]
    """,
    "slerp": """
        genome: {models: [a, b], merge_method: slerp, layer_granularity: 2}
        tasks: [sst2]
    """,
}


def texts() -> list[Any]:
    public = {path.stem: path.read_text() for path in SEARCHES}
    return [pytest.param(text, id=name) for name, text in (public | MADE_UP).items()]


def searched(folder: Path, base: Path) -> tuple[SearchSpace, list[str]]:
    """Return the search space that was written, bound to the models, and the experts."""
    plan = Plan.read(folder / "study.yaml")
    names = Checkpoint(base).names
    experts = {name: Source(path=path) for name, path in plan.config.experts.items()}
    changed = dict.fromkeys(experts, names)
    return SearchSpace(plan.space, Source(path=plan.config.base), experts, changed, names), list(experts)


def random_merge(text: str, seed: int) -> str:
    """Return the configuration of mergekit that a genome makes of one of its points."""
    config = EvolMergeConfiguration.model_validate(yaml.safe_load(textwrap.dedent(text)))
    genome = ModelGenome(config.genome)
    shape = genome.initial_genotype().shape
    genotype = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.99 + 0.01
    if config.genome.allow_negative_weights:
        genotype[..., 0] -= 0.1
        genotype[:, 0, :, 0] += 0.5
    return str(genome.genotype_merge_config(genotype.round(decimals=2)).to_yaml())


@pytest.mark.parametrize("text", texts())
def test_the_search_space_holds_every_merge_of_the_genome(text: str, here: Path, tmp_path: Path) -> None:
    take(text, tmp_path / "out")
    space, experts = searched(tmp_path / "out", here / "base")
    names = list(Checkpoint(here / "base").names)
    if space.config.anchors:  # what follows the layers is at the other end
        names = [name for name in names if name not in ("model.norm.weight", "lm_head.weight")]
    for seed in range(3):
        wanted = as_searched(read_merge(random_merge(text, seed)), space.config.method, experts)
        point = point_of(wanted, space, names)
        assert point.keys() == space.distributions.keys()
        for key, own in space.distributions.items():
            assert own.low <= point[key] <= own.high
        found = space.recipe(point)
        assert (found.method, found.choices) == (wanted.method, wanted.choices)
        theirs, ours = assign_groups(wanted.groups, names), assign_groups(found.groups, names)
        for name in names:
            for parameter, value in theirs[name].coefficients.items():
                assert ours[name].coefficients[parameter] == pytest.approx(
                    value, abs=0.0051
                )  # a grid of 0.01


def as_searched(recipe: MergeRecipe, method: str, experts: list[str]) -> MergeRecipe:
    """Return a merge as its search space says it: in shares, and from the space's first expert."""
    groups = []
    for group in recipe.groups:
        own: dict[str, Any] = dict(group.coefficients)
        if recipe.method != method:  # shares of which the base has one, or task vectors divided by their sum
            total = sum(own["lambda"].values())
            own["lambda"] = {name: own["lambda"][name] / total for name in experts}
        if method == "slerp" and list(recipe.experts) != experts:
            own["t"] = 1 - own["t"]
        selectors = LayerGroup.model_validate({key: getattr(group, key) for key in LayerGroup.model_fields})
        groups.append({**selectors.model_dump(exclude_none=True), **own})
    sources = {name: recipe.experts[name].model_dump() for name in experts}
    data = {"method": method, "base": recipe.base, "experts": sources, "groups": groups}
    return MergeRecipe.model_validate(data | {"options": recipe.options})


def point_of(recipe: MergeRecipe, space: SearchSpace, names: list[str]) -> dict[str, float]:
    """Return the point of a search space that a recipe is at, by one tensor of each layer group or anchor."""
    groups, anchors = assign_groups(recipe.groups, names), space.config.anchors or 0
    places = {f"anchor{i}": f"model.layers.{i}.mlp.up_proj.weight" for i in range(anchors)}
    for group in space.groups:
        places[group.name] = next((name for name in names if group.takes(name)), "")
    point = {}
    for key, each in space.coordinates.items():
        value = groups[places[each.group]].coefficients[each.parameter]
        point[key] = value[each.expert] if isinstance(value, dict) else value
    return point


def test_tasks_become_objectives_with_what_mergekit_evolve_asks(here: Path, tmp_path: Path) -> None:
    text = """
        genome: {models: [a, b], merge_method: task_arithmetic, base_model: base, tokenizer_source: union}
        tasks:
          - sst2
          - {name: own, weight: 2, metric: "exact_match,strict-match"}
          - {name: own, weight: 0.5, metric: f1}
          - {name: own, weight: 3, metric: "exact_match,flexible-extract"}
          - {name: wiki, weight: -0.5, metric: "word_perplexity,none"}
          - {name: idle, weight: 0}
        limit: 100
        num_fewshot: 4
        shuffle: true
        random_init: true
        apply_chat_template: false
    """
    found = take(text, tmp_path / "out", include_path=tmp_path / "tasks")
    suite = yaml.safe_load((tmp_path / "out" / "suite.yaml").read_text())
    asked = {"limit": 100, "num_fewshot": 4}
    assert suite["objectives"] == {
        "sst2": {"tasks": [{"lm_eval": "sst2", "metric": "acc", "filter": "none", **asked}]},
        "own": {
            "weight": 2,
            "tasks": [{"lm_eval": "own", "metric": "exact_match", "filter": "strict-match", **asked}],
        },
        "own-f1": {"weight": 0.5, "tasks": [{"lm_eval": "own", "metric": "f1", **asked}]},
        "own-exact_match-flexible-extract": {
            "weight": 3,
            "tasks": [{"lm_eval": "own", "metric": "exact_match", "filter": "flexible-extract", **asked}],
        },
        "wiki": {
            "weight": 0.5,
            "direction": "minimize",
            "tasks": [{"lm_eval": "wiki", "metric": "word_perplexity", "filter": "none", **asked}],
        },
    }
    assert suite["chat_template"] is False
    assert suite["include_path"] == str(tmp_path / "tasks")
    study = yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())
    assert study["vocabulary"] == "mean"
    keys = {(remark.line, remark.key) for remark in found.remarks}
    expected = {(8, "tasks.4.weight"), (9, "tasks.5"), (12, "shuffle"), (13, "random_init")}
    assert keys >= expected | {(2, "genome.tokenizer_source"), (3, "tasks")}


@pytest.mark.parametrize(
    ("genome", "tasks", "parts"),
    [
        ("models: [a, b], merge_method: linear, normalize: false", "[x]", ["`genome.normalize: false`"]),
        ("models: [a, b, c], merge_method: slerp", "[x]", ["`genome.models: [a, b, c]`", "here are 3"]),
        ("models: [a, b], merge_method: della, base_model: base", "[x]", ["that mergekit-evolve has"]),
        ("models: [a, b], merge_method: ties", "[x]", ["`genome.base_model`: `ties` must have a base"]),
        ("models: [a, a], merge_method: linear", "[x]", ["there once only"]),
        ("models: [a, b], merge_method: linear, layer_granularity: 3", "[x]", ["number of layers, 4"]),
        ("models: [a, b], merge_method: linear, filters: [1]", "[x]", ["must be texts"]),
        ("models: [a, b], merge_method: linear", "[{weight: 1}]", ["`tasks.0.name`: is required"]),
        ("models: [a, b], merge_method: linear", "[{name: x, weight: much}]", ["`tasks.0.weight: much`"]),
        ("models: [a, b], merge_method: linear", "[x, x]", ["there once only with the same metric"]),
        ("models: [a, b]", "[x]", ["`genome.merge_method`: is required"]),
        ("models: [a, b], merge_method: linear", "[]", ["`tasks: []`: must be a list with at least one"]),
        ("models: [n/a, n/b], merge_method: linear, layer_granularity: 2", "[x]", ["--layers N"]),
    ],
)
def test_what_has_no_counterpart_is_refused(
    genome: str, tasks: str, parts: list[str], here: Path, hub_cache: Path, tmp_path: Path
) -> None:
    message = refusal(f"genome: {{{genome}}}\ntasks: {tasks}\n", tmp_path / "out")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("merge", ["merge_method: task_arithmetic, base_model: base", "merge_method: slerp"])
def test_the_study_runs_on_tasks_of_ones_own(merge: str, here: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    docs = [{"prompt": f"Is {i} odd?", "choices": ["No", "Yes"], "answer": i % 2} for i in range(16)]
    (tmp_path / "tasks" / "odd.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "odd",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tasks" / "odd.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks" / "odd.yaml").write_text(yaml.safe_dump(task))
    text = f"""
        genome: {{models: [a, b], {merge}, layer_granularity: 2}}
        tasks: [odd]
        apply_chat_template: false
    """
    take(text, tmp_path / "out", include_path=tmp_path / "tasks")
    study = tmp_path / "out" / "study.yaml"
    data = yaml.safe_load(study.read_text()) | {"budget": {"trials": 1}, "engine": "transformers"}
    data |= {"allow_flat_objectives": True, "warm_start": "none"}  # of random models
    study.write_text(yaml.safe_dump(data))
    run(study, tmp_path / "run")
    found = Run(tmp_path / "run")
    assert {"base", "expert-a", "expert-b"} <= {each.name for each in found.candidates}
    assert "odd" in found.scores("base")


def test_the_command_writes_three_files_and_what_to_type_next(here: Path, tmp_path: Path) -> None:
    done = mergetune("import", SEARCHES[0], "--out", tmp_path / "out", cwd=here)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"study.yaml", "search_space.yaml", "suite.yaml"}
    assert f"Next: mergetune run {tmp_path / 'out' / 'study.yaml'} --dry-run" in done.stdout
    one = mergetune("import", SEARCHES[0], "--out", tmp_path / "one.yaml", cwd=here)
    assert one.returncode == 3
    assert "must be a new file, but this import writes several files" in one.stderr
