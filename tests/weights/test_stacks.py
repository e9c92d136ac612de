"""Stacks: the model that mergekit's slices make, with no copy of the weights, wherever a model is named."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers import build_llama, build_tokenizer, fine_tune, mergetune, train_adapter
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.measuring.model_under_test import LocalModel, open_model
from mergetune.merging.inputs import ModelPaths, open_inputs, open_recipe
from mergetune.space.recipe import MergeRecipe
from mergetune.space.stack import Stack
from mergetune.study.export import merge_recipe
from mergetune.study.plan import Plan
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.models import find_model, reference_to

SLOTS = (("a", 0, 3), ("b", 1, 4))

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of four layers and two fine-tunes of it; `tied` and `fine-tied` have no head of their own."""
    folder = tmp_path_factory.mktemp("stacked")
    for base, names, is_tied in (("base", "ab", False), ("tied", ["fine-tied"], True)):
        build_llama(folder / base, 0, num_hidden_layers=4, tie_word_embeddings=is_tied)
        for seed, name in enumerate(names, start=1):
            fine_tune(folder / base, folder / name, seed, std=0.002)
    return folder


def stack(*slots: tuple[str, int, int], **roles: str) -> Stack:
    data = [{"model": model, "layers": [first, end]} for model, first, end in slots]
    return Stack.model_validate({"stack": data, **roles})


def merge_theirs(models: Path, out: Path, *slots: tuple[str, int, int], **more: Any) -> Checkpoint:
    slices = [
        {"sources": [{"model": str(models / model), "layer_range": [first, end]}]}
        for model, first, end in slots
    ]
    config = {"slices": slices, "merge_method": "passthrough", "dtype": "float32", **more}
    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return Checkpoint(out)


def check_equal(ours: Checkpoint, theirs: Checkpoint) -> None:
    assert set(ours.names) == set(theirs.names)
    for name in ours.names:
        assert torch.equal(ours.tensor(name), theirs.tensor(name)), name
    assert ours.config == theirs.config


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(5, 45)[None]).logits
    return found


@pytest.mark.parametrize(
    "slots",
    [
        SLOTS,
        (("a", 0, 4), ("a", 0, 4)),
        (("b", 3, 4), ("a", 1, 2), ("b", 0, 1)),
        (("a", 0, 2), ("base", 2, 4)),
        (("tied", 0, 3), ("tied", 1, 4)),
        (("tied", 0, 3), ("fine-tied", 1, 4)),
    ],
    ids=str,
)
def test_a_stack_is_mergekits_passthrough(
    slots: tuple[tuple[str, int, int], ...], models: Path, tmp_path: Path
) -> None:
    theirs = merge_theirs(models, tmp_path / "theirs", *slots)
    folder = find_model(stack(*slots), models)
    check_equal(Checkpoint(folder), theirs)
    assert not list(folder.glob("*.safetensors"))
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(stack(*slots).model_dump(mode="json")))
    for name in ("base", "a", "b", "tied", "fine-tied"):
        (tmp_path / name).symlink_to(models / name)
    merge_recipe(tmp_path / "stack.yaml", tmp_path / "ours")
    check_equal(Checkpoint(tmp_path / "ours"), theirs)
    engine = TransformersEngine(EngineConfig(kind="transformers"), folder)
    with closing(engine):
        from_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        assert torch.equal(logits_of(engine.model), logits_of(from_disk))


def test_embeddings_head_and_tokenizer_may_be_of_a_named_model(models: Path, tmp_path: Path) -> None:
    found = Checkpoint(find_model(stack(*SLOTS, embeddings="b", head="base", tokenizer="b"), models))
    b, base = Checkpoint(models / "b"), Checkpoint(models / "base")
    assert torch.equal(found.view("model.embed_tokens.weight"), b.view("model.embed_tokens.weight"))
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(found.view(name), base.view(name))
    assert (found.folder / "tokenizer.json").read_bytes() == (models / "b" / "tokenizer.json").read_bytes()


def test_the_digest_follows_from_weights_and_layers_not_from_places(models: Path, tmp_path: Path) -> None:
    digest = Checkpoint(find_model(stack(*SLOTS), models)).digest
    for name in "ab":
        shutil.copytree(models / name, tmp_path / name)
    assert Checkpoint(find_model(stack(*SLOTS), tmp_path)).digest == digest
    split = stack(("a", 0, 1), ("a", 1, 3), ("b", 1, 4))
    assert Checkpoint(find_model(split, models)).digest == digest
    assert Checkpoint(find_model(stack(("a", 0, 3), ("b", 0, 3)), models)).digest != digest
    fine_tune(models / "a", tmp_path / "a", seed=9, std=0.01)
    assert Checkpoint(find_model(stack(*SLOTS), tmp_path)).digest != digest


def test_answers_are_kept_by_what_they_depend_on(models: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(models / name, tmp_path / name)
    ours, theirs = (LocalModel("", find_model(stack(*SLOTS), place)) for place in (models, tmp_path))
    assert ours.folder != theirs.folder
    assert ours.digest == theirs.digest
    assert LocalModel("", find_model(stack(*SLOTS, tokenizer="b"), models)).folder != ours.folder


def test_a_stack_is_found_by_its_file_and_named_whole(models: Path, tmp_path: Path) -> None:
    file = models / "goliath.yaml"
    file.write_text("stack:\n- {model: a, layers: [0, 3]}\n- {model: ./b, layers: [1, 4]}\n")
    folder = find_model(str(file), tmp_path)
    named = reference_to(folder)
    assert named == stack((f"{models}/a", 0, 3), (f"{models}/b", 1, 4))
    assert find_model(named, tmp_path) == folder
    opened = open_model(str(file))
    assert isinstance(opened, LocalModel)
    assert opened.folder == folder


def test_a_study_of_stacks_merges_layer_by_layer_of_the_stack(models: Path, tmp_path: Path) -> None:
    inputs = open_inputs(
        find_model(stack(("base", 0, 3), ("base", 1, 4)), models),
        {name: find_model(stack((name, 0, 3), (name, 1, 4)), models) for name in "ab"},
    )
    assert inputs.warnings == ()
    recipe = MergeRecipe.model_validate(
        {
            "method": "task_arithmetic",
            "base": inputs.base_source,
            "experts": inputs.expert_sources,
            "groups": [
                {"name": "copies", "layers": [3, 5], "lambda": {"a": 0.0, "b": 1.0}},
                {"name": "rest", "match": r"^(?!.*layers\.[3-5]\.)", "lambda": {"a": 1.0, "b": 0.0}},
            ],
        }
    )
    merged = dict(inputs.merger.merge(recipe))
    wanted = Checkpoint(find_model(stack(*SLOTS, head="a"), models))
    for name in wanted.names:
        torch.testing.assert_close(merged[name], wanted.tensor(name), rtol=0, atol=1e-6)
    recipe.write(tmp_path / "recipe.yaml")
    again, opened = open_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.digest == recipe.digest
    elsewhere = ModelPaths.model_validate_json(opened.paths.model_dump_json()).open()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in elsewhere.merger.merge(again))
    engine = TransformersEngine(EngineConfig(kind="transformers"), inputs.base.folder, inputs.merger)
    with closing(engine):
        engine.load(recipe)
        got = logits_of(engine.model)
        from_stack = TransformersEngine(EngineConfig(kind="transformers"), wanted.folder)
        torch.testing.assert_close(got, logits_of(from_stack.model), rtol=1e-4, atol=1e-5)


def test_each_slot_can_have_a_scale(models: Path, tmp_path: Path) -> None:
    scales = [{"filter": "down_proj", "value": 0.25}, {"filter": "o_proj", "value": 0.5}, {"value": 1}]
    slices: list[dict[str, Any]] = [
        {"sources": [{"model": str(models / "a"), "layer_range": [0, 3]}]},
        {
            "sources": [
                {"model": str(models / "a"), "layer_range": [1, 4], "parameters": {"scale": scales}},
            ]
        },
    ]
    theirs = merge_theirs(models, tmp_path / "theirs", slices=slices)
    place = {
        "path": stack(("a", 0, 3), ("a", 1, 4)).renamed({"a": str(models / "a")}).model_dump(mode="json")
    }
    rest = r"^(?!.*layers\.[3-5]\..*(down_proj|o_proj))"
    recipe = {
        "method": "passthrough",
        "base": place,
        "experts": {"deep": place},
        "groups": [
            {"name": "mlp", "layers": [3, 5], "match": "down_proj", "scale": 0.25},
            {"name": "attention", "layers": [3, 5], "match": "o_proj", "scale": 0.5},
            {"name": "rest", "match": rest, "scale": 1.0},
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    merge_recipe(tmp_path / "recipe.yaml", tmp_path / "ours")
    check_equal(Checkpoint(tmp_path / "ours"), theirs)


def test_settings_that_are_listed_by_layer_follow(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model: Any = Gemma2ForCausalLM
    model(Gemma2Config(**SHAPE, vocab_size=len(tokenizer), sliding_window=8)).save_pretrained(
        tmp_path / "gemma"
    )
    tokenizer.save_pretrained(tmp_path / "gemma")
    kinds = json.loads((tmp_path / "gemma" / "config.json").read_text())["layer_types"]
    found = Checkpoint(find_model(stack(("gemma", 0, 3), ("gemma", 2, 4)), tmp_path))
    assert found.config["layer_types"] == [*kinds[0:3], *kinds[2:4]]
    assert found.config["num_hidden_layers"] == 5


def test_layers_of_another_kind_than_their_place_has_are_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    }
    model: Any = Qwen3MoeForCausalLM
    model(Qwen3MoeConfig(**SHAPE, vocab_size=len(tokenizer), **experts)).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    assert Checkpoint(find_model(stack(("moe", 0, 3), ("moe", 1, 4)), tmp_path)).names
    for _ in range(2):
        with pytest.raises(MergetuneError, match="layers differ by their place"):
            find_model(stack(("moe", 1, 3)), tmp_path)


@pytest.mark.parametrize(
    ("slots", "roles", "parts"),
    [
        ([("a", 0, 5)], {}, ["a[0:5]", "has the layers [0, 4]"]),
        ([("a", 0, 2), ("wide", 0, 2)], {}, ["wide: `hidden_size` is 64, but 32 in"]),
        ([("a", 0, 2), ("more", 0, 2)], {}, ["more: its vocabulary is another one"]),
        ([("a", 0, 2), ("adapter", 0, 2)], {}, ["adapter is an adapter", "Write a model of it first"]),
        ([("a", 0, 2), ("tied", 0, 2)], {}, ["a head of their own, or neither", "(`embeddings`, `head`)"]),
        ([("a", 0, 2)], {"head": "absent"}, ["there is no such model directory"]),
    ],
)
def test_what_does_not_fit_together_is_refused(
    slots: list[tuple[str, int, int]], roles: dict[str, str], parts: list[str], models: Path, tmp_path: Path
) -> None:
    for name in ("a", "tied"):
        (tmp_path / name).symlink_to(models / name)
    build_llama(tmp_path / "wide", hidden_size=64)
    build_llama(tmp_path / "more", vocab_size=400)
    train_adapter(models / "base", tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(MergetuneError) as caught:
        find_model(stack(*slots, **roles), tmp_path)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stack: []", ["`stack`: must name at least one stack, but is empty"]),
        ("stack: [{model: a, layer: [0, 2]}]", ["`stack.0.layer`: unknown key. Did you mean `layers`?"]),
        (
            "stack: [{model: a, layers: [2, 2]}]",
            ["`stack.0.layers`: must be the first layer and the one after"],
        ),
        ("stack: [{model: a, layers: 3}]", ["`stack.0.layers`: must be a list"]),
        (
            "stack: [{model: b.yaml, layers: [0, 1]}]",
            ["`stack.0.model`: must be a model's directory or hub id"],
        ),
        ("stack: [{model: a, layers: [0, 1]}]\nhat: a", ["`hat`: unknown key"]),
        ("stack: [{layers: [0, 1]}]", ["`stack.0.model`: is required, but missing"]),
        ("stack: [{model: a, layers: [0, 9]}]", ["a[0:9]", "has the layers [0, 4]"]),
    ],
)
def test_a_broken_stack_is_explained_and_ends_with_3(
    text: str, parts: list[str], models: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").symlink_to(models / "a")
    (tmp_path / "stack.yaml").write_text(text)
    done = mergetune("merge", tmp_path / "stack.yaml", tmp_path / "out")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        ("{stack: [{model: a, layer: [0, 2]}]}", ["`base.stack.0.layer`: unknown key. Did you mean"]),
        ("{stak: []}", ["`base.stak`: unknown key. Did you mean `stack`?"]),
        ("{stack: [{model: absent, layers: [0, 2]}]}", ["absent: there is no such model directory"]),
        ("absent.yaml", ["absent.yaml: cannot be read"]),
        ("3", ["`base`: must be text or `key: value` pairs (stack,", "but got 3. Put it in quotes."]),
    ],
)
def test_a_study_explains_what_is_wrong_with_its_stack(base: str, parts: list[str], tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"base: {base}\nexperts: {{x: a}}\nsearch_space: task_arithmetic\nsuite: taskmaster\n")
    with pytest.raises(MergetuneError) as caught:
        Plan.read(study)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "adapter", "other_layers"])
def test_what_can_be_an_expert_of_a_stack_is_said(kind: str, models: Path, tmp_path: Path) -> None:
    base = find_model(stack(("base", 0, 3), ("base", 1, 4)), models)
    said = "An expert of a stack is a stack of the same layers, of fine-tunes of its models."
    if kind == "other_layers":
        expert = find_model(stack(("a", 0, 3), ("a", 0, 3)), models)
        warnings = open_inputs(base, {"deep": expert}).warnings
        assert any("has other layers than the base" in each and said in each for each in warnings)
        return
    adapter = train_adapter(models / "base", tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(MergetuneError) as caught:
        open_inputs(base, {"shallow": models / "a" if kind == "plain" else adapter})
    assert said in str(caught.value)
    assert "base[0:3]" in str(caught.value)
