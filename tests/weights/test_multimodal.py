"""Models of images and text, tiny and real: names, towers, adapters, text-only fine-tunes, engine, file."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from helpers import build_tokenizer, merge_at
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.files.library import presets
from mergetune.merging.inputs import open_inputs
from mergetune.merging.merger import Merger
from mergetune.space.recipe import MergeRecipe, RecipeGroup, count_layers, tensor_place
from mergetune.space.search_space_config import layer_groups, read_search_space
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.writer import write_model

PRESETS = list(presets("search_spaces").values())
GRID = 2**12  # weights on a grid of 1/GRID: their sums and differences are exact in float32
IDS = torch.arange(20, 60).reshape(2, 20)

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGES = {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 3, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64}


def rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "sliding_window": 16},
        "vision_config": VISION | IMAGES | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | IMAGES | {"model_type": "pixtral", "head_dim": 8},
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | IMAGES | {"model_type": "clip_vision_model"},
    },
    "qwen2_5_vl": {
        "text_config": TEXT | rope(1, 1, 2),
        "vision_config": QWEN | {"patch_size": 14, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": TEXT | rope(2, 1, 1),
        "vision_config": QWEN
        | {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [1]},
    },
    "smolvlm": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | IMAGES,
        "scale_factor": 2,
    },
}
# What one of the language part's matrices is called in the file, and in memory, where an adapter names it.
FILE_NAMES = {
    "gemma3": "language_model.model.layers.0.mlp.down_proj.weight",
    "mistral3": "language_model.model.layers.0.mlp.down_proj.weight",
    "llava": "language_model.model.layers.0.mlp.down_proj.weight",
    "qwen2_5_vl": "model.layers.0.mlp.down_proj.weight",
    "qwen3_vl": "model.language_model.layers.0.mlp.down_proj.weight",
    "smolvlm": "model.text_model.layers.0.mlp.down_proj.weight",
}
LANGUAGE = re.compile(
    r"(language_model|model\.(language_model|text_model|layers|norm|embed_tokens)|lm_head)\."
)
names = pytest.mark.parametrize("name", CONFIGS)


def shifted(model: Path, folder: Path, seed: int, only: str = "") -> Path:
    """Copy a model whose weights are noise, on a grid, away from it: those with `only` in their name."""
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.004 if only in name else torch.zeros(())
        weights[name] = ((tensor + noise) * GRID).round() / GRID
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a family's name to its base and a fine-tune of all of it, built once."""

    @cache
    def build(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
        torch.manual_seed(0)
        auto: Any = AutoModelForImageTextToText
        auto.from_config(config).save_pretrained(folder / "raw")
        build_tokenizer().save_pretrained(folder / "raw")
        base = shifted(folder / "raw", folder / "base", 0, "nothing")
        return base, shifted(base, folder / "expert", 1)

    return build


def logits(folder: Path) -> Tensor:
    auto: Any = AutoModelForImageTextToText
    with torch.no_grad():
        found: Tensor = auto.from_pretrained(folder).eval()(input_ids=IDS).logits
    return found


def logits_in_engine(base: Path, tensors: dict[str, Tensor]) -> Tensor:
    engine = TransformersEngine(EngineConfig(device="cpu"), base)
    engine.replace(tensors.items())
    with torch.no_grad():
        found: Tensor = engine.model(input_ids=IDS).logits
    return found


def train_adapter(base: Path, folder: Path, auto: Any, targets: str, seed: int = 3, **config: Any) -> Path:
    model = get_peft_model(auto.from_pretrained(base), LoraConfig(r=4, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    model.save_pretrained(str(folder))
    return folder


def merged_by_peft(base: Path, adapter: Path, folder: Path, auto: Any) -> Path:
    model: Any = PeftModel.from_pretrained(auto.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(folder)
    return folder


@names
def test_a_tower_is_no_part_of_the_language_model_s_layers(built: Any, name: str) -> None:
    tensors = Checkpoint(built(name)[0]).names
    places = {tensor: tensor_place(tensor) for tensor in tensors}
    language = [tensor for tensor, place in places.items() if place.role != "vision"]
    assert count_layers(tensors) == 2
    assert language == [tensor for tensor in tensors if LANGUAGE.match(tensor)]
    tower = {place.layer for tensor, place in places.items() if place.role == "vision"}
    assert {0, 1, 2} <= tower  # of its own three layers


@names
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_leaves_the_tower_out(built: Any, name: str, preset: Path) -> None:
    tensors = Checkpoint(built(name)[0]).names
    groups = layer_groups(read_search_space(preset), tensors)
    for tensor in tensors:
        takers = [group.name for group in groups if group.takes(tensor)]
        assert len(takers) == (tensor_place(tensor).role != "vision"), tensor


@names
def test_a_fine_tune_at_lambda_one_comes_back_but_for_its_tower(
    built: Any, name: str, tmp_path: Path
) -> None:
    base, expert = built(name)
    inputs = open_inputs(base, {"tuned": expert})
    (warning,) = inputs.warnings
    assert "tensors of the vision tower" in warning
    assert "roles: [vision]" in warning
    merged = merge_at(inputs, tuned=1.0)
    models = {"base": Checkpoint(base), "expert": Checkpoint(expert)}
    for tensor, weights in merged.items():
        origin = "base" if tensor_place(tensor).role == "vision" else "expert"
        assert torch.equal(weights, models[origin].tensor(tensor)), tensor
    expected = logits(expert)  # of text, which no tower has a part in
    assert torch.equal(logits_in_engine(base, merged), expected)
    write_model(tmp_path / "out", merged.items(), inputs.base)
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert not torch.equal(logits(base), expected)


def test_a_group_that_names_the_tower_merges_it(built: Any) -> None:
    base, expert = built("gemma3")
    inputs = open_inputs(base, {"tuned": expert})
    group = {"lambda": {"tuned": 1.0}}
    recipe = MergeRecipe(
        method="task_arithmetic",
        base=inputs.base_source,
        experts=inputs.expert_sources,
        groups=(
            RecipeGroup.model_validate({"name": "language", **group}),
            RecipeGroup.model_validate({"name": "tower", "roles": ["vision"], "layers": [0, 1], **group}),
        ),
    )
    merged = dict(Merger(inputs.base, inputs.experts).merge(recipe))
    tuned, plain = Checkpoint(expert), Checkpoint(base)
    for layer, origin in ((0, tuned), (1, tuned), (2, plain)):
        tensor = f"vision_tower.encoder.layers.{layer}.mlp.fc1.weight"
        assert torch.equal(merged[tensor], origin.tensor(tensor))


@names
def test_an_adapter_at_lambda_one_is_what_peft_merges(built: Any, name: str, tmp_path: Path) -> None:
    base, _ = built(name)
    targets = r".*(language|text)_model.*\.(q_proj|down_proj)"
    adapter = train_adapter(base, tmp_path / "adapter", AutoModelForImageTextToText, targets)
    stored = list(load_file(adapter / "adapter_model.safetensors"))
    assert not any(key.removeprefix("base_model.model.").startswith("language_model") for key in stored)
    inputs = open_inputs(base, {"lora": adapter})
    assert not inputs.warnings
    assert FILE_NAMES[name] in inputs.experts[0].targets
    expected = merged_by_peft(base, adapter, tmp_path / "merged", AutoModelForImageTextToText)
    for key, weights in merge_at(inputs, lora=1.0).items():
        torch.testing.assert_close(weights, Checkpoint(expected).tensor(key), rtol=0, atol=1e-6)


def test_an_adapter_of_a_tower_is_left_out_with_a_warning(built: Any, tmp_path: Path) -> None:
    base, _ = built("gemma3")
    adapter = train_adapter(base, tmp_path / "adapter", AutoModelForImageTextToText, r".*\.q_proj")
    inputs = open_inputs(base, {"lora": adapter})
    (warning,) = inputs.warnings
    assert "changes 3 tensors of the vision tower" in warning
    merged = merge_at(inputs, lora=1.0)
    changed = {key for key, weights in merged.items() if not torch.equal(weights, inputs.base.view(key))}
    assert changed == {f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


TEXT_ONLY = {"gemma3": "gemma3_text", "mistral3": "mistral", "llava": "llama", "smolvlm": "llama"}


@pytest.fixture(scope="module")
def text_only(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a family's name to its language part as a model of its own."""

    @cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-text")
        whole: Any = AutoModelForImageTextToText.from_pretrained(built(name)[0])
        config = whole.config.get_text_config()
        auto: Any = AutoModelForCausalLM
        part = auto.from_config(config)
        part.base_model.load_state_dict(whole.get_decoder().state_dict())
        part.lm_head.weight.data.copy_(whole.lm_head.weight.data)
        part.save_pretrained(folder / "part")
        build_tokenizer().save_pretrained(folder / "part")
        return folder / "part"

    return build


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_text_only_fine_tune_of_the_language_part_is_merged(
    built: Any, text_only: Any, name: str, tmp_path: Path
) -> None:
    base, _ = built(name)
    expert = shifted(text_only(name), tmp_path / "expert", 5)
    assert Checkpoint(expert).config["model_type"] == TEXT_ONLY[name]
    inputs = open_inputs(base, {"tuned": expert})
    assert not inputs.warnings
    merged = merge_at(inputs, tuned=1.0)
    auto: Any = AutoModelForCausalLM
    with torch.no_grad():
        expected = auto.from_pretrained(expert).eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits_in_engine(base, merged), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(base), expected, atol=1e-3)


def test_an_adapter_trained_on_the_language_part_alone_is_merged(
    built: Any, text_only: Any, tmp_path: Path
) -> None:
    base, part = built("gemma3")[0], text_only("gemma3")
    adapter = train_adapter(part, tmp_path / "adapter", AutoModelForCausalLM, r".*\.(q_proj|down_proj)")
    merged = merge_at(open_inputs(base, {"lora": adapter}), lora=1.0)
    expected = Checkpoint(merged_by_peft(part, adapter, tmp_path / "merged", AutoModelForCausalLM))
    for key in expected.names:
        torch.testing.assert_close(merged[f"language_model.{key}"], expected.tensor(key), rtol=0, atol=1e-6)


def test_names_of_an_older_file_are_those_of_today(built: Any, tmp_path: Path) -> None:
    """Gemma 3 on the Hub names its tower `vision_tower.vision_model…`, transformers 5 saves it without."""
    base, expert = built("gemma3")
    old = tmp_path / "old"
    shutil.copytree(base, old)
    renamed = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(old / "model.safetensors").items()
    }
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    inputs = open_inputs(old, {"tuned": expert})
    merged = merge_at(inputs, tuned=1.0)
    assert set(merged) == set(renamed)
    assert torch.equal(logits_in_engine(old, merged), logits(expert))


def test_a_fine_tune_of_another_model_is_refused(built: Any) -> None:
    with pytest.raises(MergetuneError, match="Every expert must be a fine-tune of the base"):
        open_inputs(built("gemma3")[0], {"other": built("mistral3")[1]})
