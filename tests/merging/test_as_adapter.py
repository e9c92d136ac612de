"""A merge as an adapter: peft loads it, merges it to our merge, and makes the same of the same adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from helpers import fine_tune, merge_with_peft, train_adapter
from mergetune.errors import MergetuneError
from mergetune.merging.as_adapter import AdapterMerge, Fit, check_adapter, merge_as_adapter
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.space.recipe import MergeRecipe
from mergetune.study.export import write_merged_adapter
from mergetune.weights.adapter_writer import served_rank

LAMBDAS = {"a": 0.7, "b": -0.4}
TOKENS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that share some layers, of other ranks and scales."""
    folder = tmp_path_factory.mktemp("adapters")
    a: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
    b: dict[str, Any] = {
        "r": 6,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    }
    return {
        "a": train_adapter(tiny_base, folder / "a", seed=1, **a),
        "b": train_adapter(tiny_base, folder / "b", seed=2, **b),
    }


@pytest.fixture(scope="module")
def pair(tiny_base: Path, adapters: dict[str, Path]) -> Inputs:
    return open_inputs(tiny_base, adapters)


def recipe(
    inputs: Inputs, method: str = "task_arithmetic", coefficients: dict[str, Any] | None = None
) -> MergeRecipe:
    """A recipe of one layer group, by default of `LAMBDAS`."""
    group = {"name": "all", **({"lambda": LAMBDAS} if coefficients is None else coefficients)}
    sources = {"base": inputs.base_source, "experts": inputs.expert_sources}
    return MergeRecipe.model_validate({"method": method, **sources, "groups": [group]})


def scaled(inputs: Inputs, **lambdas: float) -> MergeRecipe:
    return recipe(inputs, coefficients={"lambda": lambdas})


def by_layer(inputs: Inputs) -> MergeRecipe:
    """A recipe in which each layer has its own lambdas, zeros among them."""
    groups = [
        {"name": "first", "layers": [0, 0], "lambda": {"a": 1.5, "b": 0.0}},
        {"name": "rest", "match": r"^(?!model\.layers\.0\.)", "lambda": {"a": -0.5, "b": 0.8}},
    ]
    sources = {"base": inputs.base_source, "experts": inputs.expert_sources}
    return MergeRecipe.model_validate({"method": "task_arithmetic", **sources, "groups": groups})


def merged(inputs: Inputs, wanted: MergeRecipe) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in inputs.merger.merge(wanted)}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=2e-6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def with_weights(base: Path, weights: Mapping[str, Tensor]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(dict(weights), strict=False)
    return model


def weighted_by_peft(
    base: Path, adapters: Mapping[str, Path], weights: Mapping[str, float], **how: Any
) -> dict[str, Tensor]:
    """Return the base with peft's own weighted sum of adapters merged in."""
    names = list(adapters)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(adapters[names[0]]), adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(str(adapters[name]), adapter_name=name)
    model.add_weighted_adapter(names, [weights[name] for name in names], "sum", **how)
    model.set_adapter("sum")
    return dict(model.merge_and_unload(adapter_names=["sum"]).state_dict())


class TestExact:
    @pytest.mark.parametrize("make", [recipe, by_layer], ids=["one group", "by layer"])
    def test_peft_loads_it_as_the_full_merge(
        self, pair: Inputs, tiny_base: Path, tmp_path: Path, make: Any
    ) -> None:
        wanted = merged(pair, make(pair))
        found = write_merged_adapter(tmp_path / "out", make(pair), pair)
        assert (found.is_exact, found.share) == (True, 0.0)
        assert_same(merge_with_peft(tiny_base, tmp_path / "out"), wanted)
        plain: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base), str(tmp_path / "out")
        )
        torch.testing.assert_close(
            logits(plain), logits(with_weights(tiny_base, wanted)), rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(logits(plain), logits(AutoModelForCausalLM.from_pretrained(tiny_base)))

    def test_it_is_what_peft_makes_of_them(
        self, pair: Inputs, adapters: dict[str, Path], tiny_base: Path, tmp_path: Path
    ) -> None:
        write_merged_adapter(tmp_path / "out", recipe(pair), pair)
        ours = merge_with_peft(tiny_base, tmp_path / "out")
        assert_same(ours, weighted_by_peft(tiny_base, adapters, LAMBDAS, combination_type="cat"))

    def test_each_layer_has_the_ranks_of_the_experts_that_change_it(
        self, pair: Inputs, tmp_path: Path
    ) -> None:
        found = write_merged_adapter(tmp_path / "out", by_layer(pair), pair)
        ranks = {layer.path: update.rank for layer, update in found.updates.items()}
        assert ranks == {
            "model.layers.0.self_attn.q_proj": 4,
            "model.layers.0.mlp.down_proj": 4,
            "model.layers.1.self_attn.q_proj": 10,
            "model.layers.1.self_attn.v_proj": 3,
            "model.layers.1.mlp.down_proj": 4,
        }
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 4
        assert config["rank_pattern"] == {path: rank for path, rank in ranks.items() if rank != 4}
        assert "vLLM serves it with `--enable-lora --max-lora-rank 16`." in found.summary

    def test_we_read_it_as_an_expert(self, pair: Inputs, tiny_base: Path, tmp_path: Path) -> None:
        write_merged_adapter(tmp_path / "out", recipe(pair), pair)
        again = open_inputs(tiny_base, {"whole": tmp_path / "out"})
        wanted = merged(pair, recipe(pair))
        assert_same(merged(again, scaled(again, whole=1.0)), wanted)

    def test_shares_of_an_average_sum_to_one(self, pair: Inputs, tiny_base: Path, tmp_path: Path) -> None:
        average = recipe(pair, "linear", {"lambda": {"a": 3.0, "b": 1.0}})
        write_merged_adapter(tmp_path / "out", average, pair)
        assert_same(merge_with_peft(tiny_base, tmp_path / "out"), merged(pair, average))

    @pytest.mark.parametrize(
        ("method", "coefficients"),
        [
            ("model_stock", {}),
            ("nuslerp", {"t": 0.3}),
            ("multislerp", {"lambda": {"a": 1, "b": 2}}),
        ],
    )
    def test_weights_by_angles_are_weights_too(
        self, tiny_base: Path, tmp_path: Path, method: str, coefficients: dict[str, Any]
    ) -> None:
        one: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
        same = {name: train_adapter(tiny_base, tmp_path / name, seed=i, **one) for i, name in enumerate("ab")}
        inputs = open_inputs(tiny_base, same)
        wanted = recipe(inputs, method, coefficients)
        write_merged_adapter(tmp_path / "out", wanted, inputs)
        assert_same(merge_with_peft(tiny_base, tmp_path / "out"), merged(inputs, wanted))

    def test_embeddings_and_the_head_may_be_among_the_layers(self, tiny_base: Path, tmp_path: Path) -> None:
        modules = ["embed_tokens", "lm_head", "o_proj"]
        adapter = train_adapter(tiny_base, tmp_path / "a", r=3, target_modules=modules)
        inputs = open_inputs(tiny_base, {"a": adapter})
        wanted = scaled(inputs, a=0.6)
        write_merged_adapter(tmp_path / "out", wanted, inputs)
        assert_same(merge_with_peft(tiny_base, tmp_path / "out"), merged(inputs, wanted))

    def test_layers_that_are_stored_turned_round(self, tmp_path: Path) -> None:
        """GPT-2's, whose names in the file of the Hub lack a prefix, too."""
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        auto: Any = AutoModelForCausalLM
        auto.from_config(config).save_pretrained(tmp_path / "base")
        modules: dict[str, Any] = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
        adapter = train_adapter(tmp_path / "base", tmp_path / "a", r=2, **modules)
        inputs = open_inputs(tmp_path / "base", {"a": adapter})
        wanted = scaled(inputs, a=0.6)
        for rank in (None, 2):
            write_merged_adapter(tmp_path / "out", wanted, inputs, rank)
            assert_same(merge_with_peft(tmp_path / "base", tmp_path / "out"), merged(inputs, wanted))


class TestOfARank:
    def test_it_is_as_near_as_what_peft_makes_by_svd(
        self, pair: Inputs, adapters: dict[str, Path], tiny_base: Path, tmp_path: Path
    ) -> None:
        found = write_merged_adapter(tmp_path / "out", recipe(pair), pair, rank=2)
        ours = merge_with_peft(tiny_base, tmp_path / "out")
        assert_same(ours, weighted_by_peft(tiny_base, adapters, LAMBDAS, combination_type="svd", svd_rank=2))
        full, base = merged(pair, recipe(pair)), pair.base
        squares = {
            name: (float((full[name] - ours[name]).norm()), float((full[name] - base.view(name)).norm()))
            for name in full
        }
        for fit in found.fits:
            assert fit.rank == 2
            assert (fit.error, fit.norm) == pytest.approx(squares[fit.name], rel=1e-3, abs=1e-6)
        error, norm = (sum(pair[i] ** 2 for pair in squares.values()) ** 0.5 for i in (0, 1))
        assert 0 < found.share == pytest.approx(error / norm, rel=1e-3)
        assert f"{found.share:.2%}" in " ".join(found.summary)

    def test_a_rank_that_suffices_loses_nothing(self, pair: Inputs, tiny_base: Path, tmp_path: Path) -> None:
        found = write_merged_adapter(tmp_path / "out", by_layer(pair), pair, rank=64)
        assert (found.is_exact, found.rank) == (True, 10)
        assert_same(merge_with_peft(tiny_base, tmp_path / "out"), merged(pair, by_layer(pair)))

    @pytest.mark.parametrize(
        ("method", "coefficients"),
        [
            ("ties", {"lambda": LAMBDAS, "density": {"a": 0.5, "b": 0.3}}),
            ("dare_linear", {"lambda": LAMBDAS, "density": {"a": 0.5, "b": 0.3}}),
        ],
    )
    def test_other_methods_are_cut_from_the_merge_itself(
        self, pair: Inputs, tiny_base: Path, tmp_path: Path, method: str, coefficients: dict[str, Any]
    ) -> None:
        wanted = recipe(pair, method, coefficients)
        found = write_merged_adapter(tmp_path / "out", wanted, pair, rank=3)
        ours, full = merge_with_peft(tiny_base, tmp_path / "out"), merged(pair, wanted)
        assert {fit.rank for fit in found.fits} == {3}
        for fit in found.fits:
            added = full[fit.name] - pair.base.view(fit.name)
            values = torch.linalg.svdvals(added.double())
            assert fit.error == pytest.approx(float(values[3:].norm()), rel=1e-3)
            assert float((full[fit.name] - ours[fit.name]).norm()) == pytest.approx(fit.error, rel=1e-3)
        assert write_merged_adapter(tmp_path / "all", wanted, pair, rank=32).share < 1e-4

    def test_full_fine_tunes_become_adapters(
        self, tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
    ) -> None:
        """What is no layer, such as a norm, stays the base's and counts as error."""
        inputs = open_inputs(tiny_base, tiny_experts)
        wanted = recipe(inputs)
        found = write_merged_adapter(tmp_path / "out", wanted, inputs, rank=32)
        ours, full = merge_with_peft(tiny_base, tmp_path / "out"), merged(inputs, wanted)
        lost = {fit.name for fit in found.fits if fit.rank == 0}
        assert lost == {name for name in full if "norm" in name}
        for name, tensor in full.items():
            expected = inputs.base.view(name) if name in lost else tensor
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)
        assert any("5 tensors that the merge changes are in no adapter" in line for line in found.summary)
        assert {fit.share for fit in found.fits if fit.rank == 0} == {1.0}

    @pytest.mark.parametrize("kind", ["dora", "saved"])
    def test_what_is_no_product_is_cut_as_a_matrix(self, tiny_base: Path, tmp_path: Path, kind: str) -> None:
        how: dict[str, Any] = {"use_dora": True} if kind == "dora" else {"modules_to_save": ["lm_head"]}
        adapter = train_adapter(tiny_base, tmp_path / "a", r=2, target_modules=["q_proj"], **how)
        inputs = open_inputs(tiny_base, {"a": adapter})
        wanted = scaled(inputs, a=1.0)
        with pytest.raises(MergetuneError, match=r"`a` adds no plain product .*--rank"):
            merge_as_adapter(inputs, wanted)
        write_merged_adapter(tmp_path / "out", wanted, inputs, rank=32)
        ours = merge_with_peft(tiny_base, tmp_path / "out")
        for name, tensor in merged(inputs, wanted).items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)

    def test_a_merge_in_half_precision_is_cut_before_it_is_rounded(
        self, tmp_path: Path, tiny_base: Path
    ) -> None:
        base = fine_tune(tiny_base, tmp_path / "base", seed=0, std=0.0, dtype=torch.bfloat16)
        adapter = train_adapter(base, tmp_path / "a", r=2, target_modules=["q_proj"], use_dora=True)
        inputs = open_inputs(base, {"a": adapter})
        found = merge_as_adapter(inputs, scaled(inputs, a=0.01), rank=32)
        assert found.share < 1e-3


class TestRefused:
    @pytest.mark.parametrize(
        ("method", "coefficients"),
        [
            ("ties", {"lambda": LAMBDAS, "density": {"a": 0.5, "b": 0.3}}),
            ("slerp", {"t": 0.5}),
        ],
    )
    def test_no_exact_adapter_of_what_is_no_sum(
        self, pair: Inputs, method: str, coefficients: dict[str, Any]
    ) -> None:
        with pytest.raises(MergetuneError, match=f"`{method}`, with these options, is no sum .*--rank"):
            merge_as_adapter(pair, recipe(pair, method, coefficients))
        with pytest.raises(MergetuneError, match="is no sum"):
            check_adapter(
                pair,
                recipe(pair, method, coefficients).method,
                recipe(pair, method, coefficients).choices,
                None,
            )

    def test_norms_and_tied_embeddings(self, tiny_tied_base: Path, tmp_path: Path) -> None:
        how: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}
        adapter = train_adapter(tiny_tied_base, tmp_path / "a", **how)
        inputs = open_inputs(tiny_tied_base, {"a": adapter})
        wanted = scaled(inputs, a=1.0)
        with pytest.raises(MergetuneError, match=r"embeddings that are the head, too: model.embed_tokens"):
            merge_as_adapter(inputs, wanted)
        with pytest.raises(MergetuneError, match="embeddings that are the head"):
            check_adapter(inputs, "task_arithmetic", {}, None)
        check_adapter(inputs, "task_arithmetic", {}, 8)
        found = merge_as_adapter(inputs, wanted, rank=8)
        assert [fit.name for fit in found.fits if not fit.rank] == ["model.embed_tokens.weight"]

    def test_tokens_that_experts_added(self, pair: Inputs) -> None:
        extended = replace(pair, given=pair.base.folder, vocabulary="mean")
        for rank in (None, 4):
            with pytest.raises(MergetuneError, match="must have the base's tokens"):
                check_adapter(extended, "task_arithmetic", {}, rank)

    def test_a_merge_that_changes_nothing(self, pair: Inputs) -> None:
        for rank in (None, 4):
            with pytest.raises(MergetuneError, match="changes none"):
                merge_as_adapter(pair, scaled(pair, a=0.0, b=0.0), rank)

    def test_coefficients_that_are_too_large(self, pair: Inputs) -> None:
        for rank in (None, 4):
            with pytest.raises(MergetuneError, match="infinite or NaN"):
                merge_as_adapter(pair, scaled(pair, a=1e300, b=0.0), rank)

    def test_an_expert_is_not_written_over(self, tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
        own = Path(shutil.copytree(tiny_adapter, tmp_path / "own"))
        inputs = open_inputs(tiny_base, {"a": own})
        with pytest.raises(MergetuneError, match="is a model of the merge"):
            write_merged_adapter(own, scaled(inputs, a=1.0), inputs)
        assert load_file(own / "adapter_model.safetensors")


def test_a_folder_of_something_else_is_left_as_it_is(pair: Inputs, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(MergetuneError, match="is not replaced"):
        write_merged_adapter(tmp_path, recipe(pair), pair)
    assert [file.name for file in tmp_path.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize(
    ("rank", "served"), [(1, 1), (2, 8), (8, 8), (17, 32), (300, 320), (512, 512), (513, None)]
)
def test_vllm_pads_ranks_to_those_that_it_has(rank: int, served: int | None) -> None:
    assert served_rank(rank) == served


def test_a_rank_beyond_what_vllm_takes_is_warned_of() -> None:
    found = AdapterMerge({}, (Fit("x", 600, 1.0, 0.0),))
    assert any(line.startswith("warning: vLLM takes ranks up to 512") for line in found.summary)
