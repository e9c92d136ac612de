from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from helpers import build_llama, build_tokenizer, fine_tune, merge_at, train_adapter
from mergetune.errors import MergetuneError
from mergetune.merging.inputs import open_inputs
from mergetune.weights.adapter import open_expert
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.compatibility import (
    base_norm,
    check_compatibility,
    check_finite,
    check_task_vectors,
    task_vector_norms,
)


@pytest.fixture
def base(tiny_base: Path) -> Checkpoint:
    return Checkpoint(tiny_base)


@pytest.fixture
def copied(tiny_experts: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of expert `a` that a test may change."""
    return Path(shutil.copytree(tiny_experts["a"], tmp_path / "expert"))


def check(base: Checkpoint, *folders: Path) -> list[str]:
    experts = [open_expert(f"expert{i}", folder, base) for i, folder in enumerate(folders)]
    return check_compatibility(base, experts)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_fine_tunes_and_adapters_of_the_base_pass(
    base: Checkpoint, tiny_experts: dict[str, Path], tiny_adapter: Path
) -> None:
    assert check(base, *tiny_experts.values(), tiny_adapter) == []


def test_sharding_and_the_notation_of_older_configs_do_not_matter(base: Checkpoint, copied: Path) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    del config["head_dim"], config["mlp_bias"]
    path.write_text(json.dumps(config | {"transformers_version": "4.40.0", "use_cache": False}))
    assert check(base, copied) == []


class TestConfigs:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rms_norm_eps", 1e-5),
            ("hidden_act", "gelu"),
            ("num_key_value_heads", 4),
            ("rope_parameters", {"rope_theta": 500000.0, "rope_type": "default"}),
            ("architectures", ["MistralForCausalLM"]),
        ],
    )
    def test_keys_that_change_the_function_are_compared(
        self, base: Checkpoint, copied: Path, key: str, value: object
    ) -> None:
        edit_json(copied / "config.json", **{key: value})
        with pytest.raises(MergetuneError, match=rf"expert/config\.json: `{key}.*fine-tune of this"):
            check(base, copied)

    def test_unknown_architectures_are_compared_as_written(
        self, tiny_base: Path, copied: Path, tmp_path: Path
    ) -> None:
        ours = Path(shutil.copytree(tiny_base, tmp_path / "base"))
        for folder in (ours, copied):
            edit_json(folder / "config.json", model_type="of_tomorrow")
        assert check(Checkpoint(ours), copied) == []
        edit_json(copied / "config.json", depth_of_thought=3)
        with pytest.raises(MergetuneError, match="`depth_of_thought` is 3, but the base has None"):
            check(Checkpoint(ours), copied)

    def test_keys_of_use_are_warned_of(self, base: Checkpoint, copied: Path) -> None:
        edit_json(copied / "config.json", pad_token_id=2, attention_dropout=0.1)
        (warning,) = check(base, copied)
        assert "`pad_token_id` is 2, but the base has 0" in warning


class TestTensors:
    def test_names_and_shapes(self, base: Checkpoint, copied: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors["extra.weight"] = tensors.pop("model.norm.weight")
            tensors["lm_head.weight"] = torch.ones(320, 31)

        edit_tensors(copied, change)
        with pytest.raises(MergetuneError) as caught:
            check(base, copied)
        message = str(caught.value)
        assert "lacks model.norm.weight. Give a checkpoint saved from the same" in message
        assert "has extra.weight, which the base lacks" in message
        assert "`lm_head.weight` is (320, 31) instead of (320, 32). Give" in message

    def test_all_mismatches_of_all_experts_stand_in_one_error(self, base: Checkpoint, tmp_path: Path) -> None:
        wide = build_llama(tmp_path / "wide", hidden_size=64)
        deep = build_llama(tmp_path / "deep", num_hidden_layers=3)
        tied = build_llama(tmp_path / "tied", tie_word_embeddings=True)
        with pytest.raises(MergetuneError) as caught:
            check(base, wide, deep, tied)
        message = str(caught.value)
        assert "wide/config.json: `hidden_size` is 64, but the base has 32" in message
        assert "and 16 more" in message  # shapes
        assert "deep/config.json: `num_hidden_layers` is 3" in message
        assert "deep: has model.layers.2." in message
        assert "tied takes its embeddings for one. Untie the latter: add a copy" in message

    @pytest.mark.parametrize("says_tied", [True, False, None])
    def test_a_head_that_is_stored_apart_and_equals_the_embeddings_is_tied(
        self, says_tied: bool | None, tiny_tied_base: Path, tmp_path: Path
    ) -> None:
        expert = fine_tune(tiny_tied_base, tmp_path / "expert", 1, std=0.002)
        edit_tensors(expert, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        config = json.loads((expert / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        settings = {} if says_tied is None else {"tie_word_embeddings": says_tied}
        (expert / "config.json").write_text(json.dumps(config | settings))
        assert check(Checkpoint(tiny_tied_base), expert) == []

    def test_a_tied_fine_tune_of_a_base_whose_head_repeats_its_embeddings(
        self, tiny_tied_base: Path, tmp_path: Path
    ) -> None:
        """Its embeddings are its head, too."""
        base = Path(shutil.copytree(tiny_tied_base, tmp_path / "base"))
        edit_tensors(base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        tuned = fine_tune(tiny_tied_base, tmp_path / "tuned", 1, std=0.002)
        opened = open_expert("tuned", tuned, Checkpoint(base))
        head, embeddings = (opened.weights(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
        assert head is not None
        assert embeddings is not None
        assert torch.equal(head, embeddings)
        assert not Checkpoint(base).is_tied
        assert check(Checkpoint(base), tuned) == []

    def test_another_dtype_is_warned_of(self, base: Checkpoint, tiny_base: Path, tmp_path: Path) -> None:
        expert = fine_tune(tiny_base, tmp_path / "half", 1, std=0.002, dtype=torch.bfloat16)
        (warning,) = check(base, expert)
        assert "half: 21 of 21 tensors are torch.bfloat16, but torch.float32 in the base" in warning

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.float16),
            (torch.float16, torch.bfloat16),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
        ],
    )
    def test_an_expert_of_another_dtype_is_merged_in_the_base_s(
        self, tiny_base: Path, tmp_path: Path, ours: torch.dtype, theirs: torch.dtype
    ) -> None:
        base = fine_tune(tiny_base, tmp_path / "base", seed=0, std=0.0, dtype=ours)
        expert = fine_tune(tiny_base, tmp_path / "expert", seed=1, std=0.002, dtype=theirs)
        inputs = open_inputs(base, {"a": expert})
        (warning,) = inputs.warnings
        assert f"tensors are {theirs}, but {ours} in the base; the merged model has the base's" in warning
        tuned = load_file(expert / "model.safetensors")
        for name, tensor in merge_at(inputs, a=1.0).items():
            assert tensor.dtype == ours
            torch.testing.assert_close(tensor, tuned[name].to(ours))

    @pytest.mark.parametrize("stored_in", ["base", "expert", "both"])
    def test_a_tied_head_may_be_stored_or_not(
        self, tiny_tied_base: Path, tmp_path: Path, stored_in: str
    ) -> None:
        def store_head(tensors: dict[str, Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        base = Path(shutil.copytree(tiny_tied_base, tmp_path / "base"))
        expert = fine_tune(tiny_tied_base, tmp_path / "expert", 1, std=0.002)
        for folder in (base, expert):
            if stored_in in (folder.name, "both"):
                edit_tensors(folder, store_head)
        inputs = open_inputs(base, {"a": expert})
        tuned = load_file(expert / "model.safetensors")
        for name, tensor in merge_at(inputs, a=1.0).items():
            torch.testing.assert_close(tensor, tuned[name])

    @pytest.mark.parametrize("tied", ["base", "expert"])
    def test_a_head_of_its_own_and_a_tied_one_are_refused_with_a_remedy_that_works(
        self, tiny_tied_base: Path, tmp_path: Path, tied: str
    ) -> None:
        folders = {"base": Path(shutil.copytree(tiny_tied_base, tmp_path / "base"))}
        folders["expert"] = fine_tune(folders["base"], tmp_path / "expert", 1, std=0.002)
        untied = "expert" if tied == "base" else "base"

        def untie(folder: Path) -> None:
            def add_head(tensors: dict[str, Tensor]) -> None:
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

            edit_tensors(folder, add_head)
            edit_json(folder / "config.json", tie_word_embeddings=False)

        untie(folders[untied])
        edit_tensors(folders[untied], lambda tensors: tensors["lm_head.weight"].add_(0.001))
        with pytest.raises(MergetuneError) as caught:
            check(Checkpoint(folders["base"]), folders["expert"])
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 1
        assert f"{untied}: has a head of its own, `lm_head.weight`, but {folders[tied]} takes" in lines[0]
        assert "add a copy of `model.embed_tokens.weight` to its weights as `lm_head.weight`" in lines[0]
        untie(folders[tied])
        assert check(Checkpoint(folders["base"]), folders["expert"]) == []
        assert "lm_head.weight" in merge_at(open_inputs(folders["base"], {"a": folders["expert"]}), a=1.0)

    def test_buffers_that_follow_from_the_config_are_overlooked(self, base: Checkpoint, copied: Path) -> None:
        def add_buffers(tensors: dict[str, Tensor]) -> None:
            for name in ("inv_freq", "cos_cached", "sin_cached"):
                tensors[f"model.layers.0.self_attn.rotary_emb.{name}"] = torch.ones(4)
            tensors["model.position_ids"] = torch.arange(8)

        edit_tensors(copied, add_buffers)
        assert check(base, copied) == []


class TestTokenizers:
    def test_another_tokenizer_is_refused(self, base: Checkpoint, copied: Path) -> None:
        build_tokenizer(("<|tool|>",)).save_pretrained(copied)
        with pytest.raises(MergetuneError, match=r"expert: \d+ tokens differ.*base's tokenizer"):
            check(base, copied)

    def test_an_added_token_without_a_row_is_left_out_and_named(self, base: Checkpoint, copied: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(copied)
        tokenizer.add_tokens(["<|tool|>"])
        tokenizer.save_pretrained(copied)
        (warning,) = check(base, copied)
        assert "1 tokens of its tokenizer have no row in its embeddings" in warning
        assert "'<|tool|>'" in warning

    def test_an_adapter_that_ships_another_tokenizer_is_refused(
        self, base: Checkpoint, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
        build_tokenizer(("<|tool|>",)).save_pretrained(adapter)
        with pytest.raises(MergetuneError, match=r"adapter: \d+ tokens differ"):
            check(base, adapter)

    def test_slow_tokenizer_files_are_compared_with_fast_ones(self, base: Checkpoint, copied: Path) -> None:
        tokenizer = json.loads((copied / "tokenizer.json").read_text())
        (copied / "tokenizer.json").unlink()
        vocabulary = tokenizer["model"]["vocab"]
        (copied / "vocab.json").write_text(json.dumps(vocabulary))
        assert check(base, copied) == []
        (copied / "added_tokens.json").write_text(json.dumps({"<|tool|>": 320}))
        (warning,) = check(base, copied)
        assert "'<|tool|>'" in warning

    def test_missing_tokenizer_is_warned_of(self, base: Checkpoint, copied: Path) -> None:
        for path in copied.glob("tokenizer*"):
            path.unlink()
        (warning,) = check(base, copied)
        assert "expert: holds no tokenizer files" in warning

    def test_other_merges_are_warned_of(self, base: Checkpoint, copied: Path) -> None:
        path = copied / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [" ".join(merge) for merge in merges]  # older notation
        path.write_text(json.dumps(tokenizer))
        assert check(base, copied) == []
        tokenizer["model"]["merges"] = merges[::-1]
        path.write_text(json.dumps(tokenizer))
        (warning,) = check(base, copied)
        assert "tokenizer.json: merges differ" in warning

    def test_another_chat_template_is_warned_of(self, base: Checkpoint, copied: Path) -> None:
        (copied / "chat_template.jinja").write_text("{{ messages }}")
        (warning,) = check(base, copied)
        assert "expert: the chat template differs" in warning


class TestAdapters:
    def test_base_of_another_name_is_warned_of(
        self, base: Checkpoint, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
        config = adapter / "adapter_config.json"
        edit_json(config, base_model_name_or_path="someone/other-model")
        (warning,) = check(base, adapter)
        assert f"{config}: names `someone/other-model` as its base" in warning
        edit_json(config, base_model_name_or_path="someone/tiny-base")
        assert check(base, adapter) == []

    def test_base_in_the_cache_of_the_hub_is_recognized(
        self, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        snapshot = tmp_path / "models--someone--renamed" / "snapshots" / "0123"
        shutil.copytree(tiny_base, snapshot)
        adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/renamed")
        assert check(Checkpoint(snapshot), adapter) == []

    def test_embeddings_that_are_also_the_head_are_warned_of(
        self, tiny_tied_base: Path, tmp_path: Path
    ) -> None:
        adapter = train_adapter(tiny_tied_base, tmp_path / "a", target_modules=["embed_tokens"])
        (warning,) = check(Checkpoint(tiny_tied_base), adapter)
        assert "trains `model.embed_tokens.weight`, which is also the base's head" in warning


class TestNorms:
    def test_norms_are_those_of_the_differences(
        self, base: Checkpoint, tiny_experts: dict[str, Path], tiny_adapter: Path
    ) -> None:
        folders = {**tiny_experts, "lora": tiny_adapter}
        experts = [open_expert(name, folder, base) for name, folder in folders.items()]
        norms = task_vector_norms(base, experts)
        assert norms["b"] / norms["a"] == pytest.approx(2, rel=0.05)
        assert norms["lora"] > 0
        tensors = [base.tensor(name).double() for name in base.names]
        ours = torch.cat([tensor.flatten() for tensor in tensors])
        theirs = load_file(tiny_experts["a"] / "model.safetensors")
        difference = torch.cat([theirs[name].double().flatten() for name in base.names]) - ours
        assert norms["a"] == pytest.approx(float(difference.norm()), rel=1e-6)
        matrices = torch.cat([tensor.flatten() for tensor in tensors if tensor.ndim == 2])
        assert base_norm(base) == pytest.approx(float(matrices.norm()), rel=1e-12)

    def test_another_base_of_equal_shape_is_warned_of(
        self, base: Checkpoint, tiny_experts: dict[str, Path], tmp_path: Path
    ) -> None:
        folders = {**tiny_experts, "stranger": build_llama(tmp_path / "stranger", seed=7)}
        assert check(base, *folders.values()) == []
        experts = [open_expert(name, folder, base) for name, folder in folders.items()]
        norms = task_vector_norms(base, experts)
        (warning,) = check_task_vectors(norms, base_norm(base))
        assert "`stranger` is 1.4" in warning
        assert "trained from another base" in warning

    @pytest.mark.parametrize(
        ("norms", "words"),
        [
            ({"a": 1.0, "b": 2.0}, []),
            ({"a": 1.0}, []),
            ({"a": 0.0, "b": 1.0}, ["`a` equals the base"]),
            ({"a": 60.0, "b": 60.0}, ["`a` is 0.60 times as long", "`b` is 0.60 times as long"]),
            ({"a": 1.0, "b": 6.0}, ["`b` is 6.0 times as long as the others"]),
            ({"a": 1.0, "b": 6.0, "c": 7.0}, ["`a` is 6.5 times shorter than the others"]),
        ],
    )
    def test_warnings(self, norms: dict[str, float], words: list[str]) -> None:
        warnings = check_task_vectors(norms, base_norm=100.0)
        assert len(warnings) == len(words)
        assert all(word in warning for word, warning in zip(words, warnings, strict=True))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_broken_expert_is_named(self, base: Checkpoint, copied: Path, value: float) -> None:
        edit_tensors(copied, lambda tensors: tensors["model.norm.weight"][3:5].fill_(value))
        with pytest.raises(MergetuneError, match=r"`tools` \(.*expert\).*2 of 32 .*model\.norm"):
            task_vector_norms(base, [open_expert("tools", copied, base)])

    def test_a_broken_base_is_named(self, copied: Path) -> None:
        edit_tensors(copied, lambda tensors: tensors["model.norm.weight"][0].fill_(math.nan))
        with pytest.raises(MergetuneError, match=r"The base .*expert: .* 1 of 32 .*model\.norm"):
            task_vector_norms(Checkpoint(copied), [])

    def test_finite_tensors_of_any_dtype_pass(self) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool):
            check_finite(torch.ones(3, dtype=dtype), "weight", "expert")
