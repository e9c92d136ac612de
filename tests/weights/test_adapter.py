from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from helpers import build_llama, merge_with_peft, train_adapter
from mergetune.errors import MergetuneError
from mergetune.merging.inputs import open_inputs
from mergetune.merging.merger import Merger
from mergetune.space.recipe import MergeRecipe, Source
from mergetune.weights.adapter import LoraExpert, open_expert
from mergetune.weights.checkpoint import Checkpoint, FullExpert

TOKENS = {"lm_head": [5], "embed_tokens": [2, 9]}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2: its linear layers are stored transposed, some are square, and its head is tied."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    auto: Any = AutoModelForCausalLM  # `from_config` has no types
    auto.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(tiny_adapter: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_adapter` that a test may damage."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def assert_merges_like_peft(base_folder: Path, adapter: Path) -> LoraExpert:
    base = Checkpoint(base_folder)
    expert = LoraExpert("tuned", adapter, base)
    expected = merge_with_peft(base_folder, adapter)
    sources = Source(path="base"), {"tuned": Source(path="tuned")}
    whole = MergeRecipe.of_one_group("task_arithmetic", *sources, {"lambda": {"tuned": 1.0}})
    merged = dict(Merger(base, [expert]).merge(whole))
    for name in base.names:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=1e-7)
        tensor = base.tensor(name)
        vector = expert.task_vector(name, tensor)
        assert (vector is None) == (name not in expert.targets)
        if vector is None:
            assert torch.equal(tensor, expected[name])
        else:
            assert vector.shape == tensor.shape
            assert vector.dtype == torch.float32
            torch.testing.assert_close(tensor + vector, expected[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, expected[name])
    return expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ALL_LINEAR},
        {
            "r": 4,
            "target_modules": ALL_LINEAR,
            "rank_pattern": {
                "q_proj": 8,
                r"layers\.1\.mlp\.up_proj": 2,
                "^model.layers.0.self_attn.o_proj": 1,
            },
            "alpha_pattern": {
                "proj": 99,  # no module's name ends in `.proj`
                "^layers.0.mlp.up_proj": 99,  # no module's path begins so
                "layers.0.self_attn.q_proj": 32,
                "q_proj": 3,
            },
        },
        {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["post_attention_layernorm"]},
        {"r": 4, "lora_alpha": 16, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"r": 4, "lora_alpha": 16, "target_modules": ALL_LINEAR, "use_dora": True},
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 300]},
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"lm_head": [5], "embed_tokens": [2]},
        },
    ],
    ids=[
        *("plain", "patterns", "rslora", "modules_to_save", "norms", "embedding", "orthogonal", "dora"),
        *("tokens", "tokens of two"),
    ],
)
def test_task_vector_is_what_peft_merges(
    tiny_base: Path, tmp_path: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    adapter = train_adapter(tiny_base, tmp_path / "adapter", dtype=dtype, **config)
    stored = load_file(adapter / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {dtype}
    assert_merges_like_peft(tiny_base, adapter)


def test_dora_of_transposed_layers(gpt2: Path, tmp_path: Path) -> None:
    modules: dict[str, Any] = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    assert_merges_like_peft(gpt2, train_adapter(gpt2, tmp_path / "adapter", r=4, use_dora=True, **modules))


def rename(adapter: Path, change: Callable[[str], str | None]) -> None:
    """Rename the tensors of an adapter's file; None leaves one out."""
    path = adapter / "adapter_model.safetensors"
    named = [(change(name), tensor) for name, tensor in load_file(path).items()]
    save_file({name: tensor for name, tensor in named if name is not None}, path)


def test_keys_with_the_adapters_name_are_read(tiny_base: Path, tmp_path: Path) -> None:
    """As in peft's memory, and in files that trainers write without peft's own save."""
    config: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    adapter = train_adapter(tiny_base, tmp_path / "adapter", **config)
    base = Checkpoint(tiny_base)
    plain = LoraExpert("plain", adapter, base)
    expected = {name: plain.task_vector(name, base.tensor(name)) for name in base.names}
    renamed = {"lora_A.weight": "lora_A.default.weight", "lora_B.weight": "lora_B.default.weight"}
    renamed |= {"embedding_A": "embedding_A.default", "embedding_B": "embedding_B.default"}
    renamed |= {"lm_head.weight": "lm_head.modules_to_save.default.weight"}
    for old, new in renamed.items():
        rename(adapter, partial(re.sub, f"{re.escape(old)}$", new))
    found = LoraExpert("found", adapter, base)
    assert found.targets
    for name in base.names:
        vector, wanted = found.task_vector(name, base.tensor(name)), expected[name]
        assert (vector is None) == (wanted is None)
        assert vector is None or wanted is None or torch.equal(vector, wanted)


def test_layers_that_are_missing_are_named(tiny_base: Path, tmp_path: Path) -> None:
    adapter = train_adapter(tiny_base, tmp_path / "adapter", r=4, target_modules=["q_proj", "v_proj"])
    assert not any("other layers" in warning for warning in open_inputs(tiny_base, {"a": adapter}).warnings)
    rename(adapter, lambda name: None if "layers.1." in name else name)
    (warning,) = (w for w in open_inputs(tiny_base, {"a": adapter}).warnings if "other layers" in w)
    assert "model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.v_proj.weight" in warning


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_transposed_layers_and_biases(gpt2: Path, tmp_path: Path, bias: str) -> None:
    adapter = train_adapter(
        gpt2,
        tmp_path / "adapter",
        r=4,
        target_modules=["c_attn", "attn.c_proj"],
        fan_in_fan_out=True,
        bias=bias,
    )
    expert = assert_merges_like_peft(gpt2, adapter)
    assert expert.factors("transformer.h.0.attn.c_attn.weight") is not None
    assert ("transformer.h.0.attn.c_attn.bias" in expert.targets) == (bias != "none")


def test_embeddings_of_a_tied_base(tiny_tied_base: Path, tmp_path: Path) -> None:
    adapter = train_adapter(tiny_tied_base, tmp_path / "adapter", target_modules=["embed_tokens"])
    expert = assert_merges_like_peft(tiny_tied_base, adapter)
    assert expert.factors("model.embed_tokens.weight") is not None


def test_embeddings_that_peft_saves_beside_their_factors(tiny_base: Path, tmp_path: Path) -> None:
    """They are the base's, so that the factors are all that is added; trained ones add their own change."""
    adapter = train_adapter(tiny_base, tmp_path / "adapter", target_modules=["embed_tokens"])
    name, base = "model.embed_tokens.weight", Checkpoint(tiny_base)
    saved = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(adapter, **{saved: base.tensor(name)})
    factors = LoraExpert("tuned", adapter, base).factors(name)
    assert factors is not None
    edit_tensors(adapter, **{saved: base.tensor(name) + 1})
    trained = LoraExpert("tuned", adapter, base)
    assert trained.factors(name) is None
    vector = trained.task_vector(name, base.tensor(name))
    torch.testing.assert_close(vector, factors.product() + 1, rtol=1e-5, atol=1e-5)


def test_a_saved_head_that_repeats_tied_embeddings_is_one_tensor(
    tiny_tied_base: Path, tmp_path: Path
) -> None:
    adapter = train_adapter(
        tiny_tied_base,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    assert "base_model.model.lm_head.weight" in load_file(adapter / "adapter_model.safetensors")
    assert_merges_like_peft(tiny_tied_base, adapter)


def test_works_on_a_base_in_bfloat16(tiny_base: Path, tiny_adapter: Path) -> None:
    base = Checkpoint(tiny_base)
    expert = LoraExpert("tuned", tiny_adapter, base)
    name = expert.targets[0]
    vector = expert.task_vector(name, base.tensor(name).bfloat16())
    expected = expert.task_vector(name, base.tensor(name))
    assert vector is not None
    assert expected is not None
    assert torch.equal(vector, expected)


def test_digest_depends_on_weights_and_scale_only(tiny_base: Path, tiny_adapter: Path, copied: Path) -> None:
    base = Checkpoint(tiny_base)
    digest = LoraExpert("one", tiny_adapter, base).digest
    edit_config(copied, base_model_name_or_path="elsewhere", lora_dropout=0.5)
    assert LoraExpert("two", copied, base).digest == digest
    edit_config(copied, lora_alpha=9)
    assert LoraExpert("two", copied, base).digest != digest


def test_open_expert_tells_adapters_from_checkpoints(
    tiny_base: Path, tiny_adapter: Path, tiny_experts: dict[str, Path]
) -> None:
    base = Checkpoint(tiny_base)
    assert isinstance(open_expert("lora", tiny_adapter, base), LoraExpert)
    full = open_expert("full", tiny_experts["a"], base)
    assert isinstance(full, FullExpert)
    assert (full.name, full.folder, full.digest) == (
        "full",
        tiny_experts["a"],
        Checkpoint(tiny_experts["a"]).digest,
    )


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"peft_type": "LOHA"}, "`peft_type: LORA` must hold, but got LOHA"),
            ({"lora_bias": True}, "biases"),
            ({"alora_invocation_tokens": [1]}, "some tokens only"),
            ({"layer_replication": [[0, 2]]}, "repeats"),
            ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4` changes the base's own"),
            ({"init_lora_weights": "olora"}, "changes the base's own"),
            ({"init_lora_weights": "loftq"}, "changes the base's own"),
            ({"init_lora_weights": "corda"}, "changes the base's own"),
            ({"init_lora_weights": "lora_ga"}, "changes the base's own"),
        ],
    )
    def test_kinds_that_are_no_task_vector(
        self, tiny_base: Path, copied: Path, changes: dict[str, object], reason: str
    ) -> None:
        edit_config(copied, **changes)
        with pytest.raises(MergetuneError, match=reason) as caught:
            open_expert("tuned", copied, Checkpoint(tiny_base))
        assert str(copied / "adapter_config.json") in str(caught.value)
        assert "merge_and_unload" in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"use_dora": True}, "DoRA's magnitudes are missing"),
            ({"trainable_token_indices": [1]}, "the rows are missing that"),
        ],
    )
    def test_parts_that_the_config_names_and_the_file_lacks(
        self, tiny_base: Path, copied: Path, changes: dict[str, object], reason: str
    ) -> None:
        edit_config(copied, **changes)
        with pytest.raises(MergetuneError, match=reason):
            open_expert("tuned", copied, Checkpoint(tiny_base))

    def test_dora_of_embeddings(self, tiny_base: Path, tmp_path: Path) -> None:
        train_adapter(tiny_base, tmp_path, target_modules=["embed_tokens"], use_dora=True)
        with pytest.raises(MergetuneError, match="DoRA of embeddings is not merged"):
            open_expert("tuned", tmp_path, Checkpoint(tiny_base))

    @pytest.mark.parametrize(
        "config",
        [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}],
    )
    def test_head_of_its_own_on_a_tied_base(
        self, tiny_tied_base: Path, tmp_path: Path, config: dict[str, Any]
    ) -> None:
        train_adapter(tiny_tied_base, tmp_path, **config)
        with pytest.raises(MergetuneError, match=r"lm_head.weight on its own.*ties the head"):
            open_expert("tuned", tmp_path, Checkpoint(tiny_tied_base))

    def test_resized_vocabulary(self, tiny_base: Path, copied: Path) -> None:
        edit_tensors(copied, **{"base_model.model.lm_head.weight": torch.ones(321, 32)})
        with pytest.raises(MergetuneError, match=r"321 rows for tokens, not the base's 320.*tokenizer there"):
            open_inputs(tiny_base, {"tuned": copied})

    def test_adapter_of_a_wider_base(self, tiny_base: Path, tmp_path: Path) -> None:
        wide = build_llama(tmp_path / "wide-model", hidden_size=64, num_attention_heads=8)
        adapter = train_adapter(wide, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
        with pytest.raises(MergetuneError) as caught:
            open_expert("tuned", adapter, Checkpoint(tiny_base))
        message = str(caught.value)
        assert str(adapter / "adapter_model.safetensors") in message
        shapes = r"LoRA's B @ A has shape \(64, 64\), but the base's shape is \(32, 32\)"
        assert len(re.findall(rf"self_attn\.[qo]_proj\.weight: {shapes}", message)) == 4
        assert "wide-model` as its base: give that one" in message

    def test_adapter_of_a_deeper_base(self, tiny_base: Path, tmp_path: Path) -> None:
        deep = build_llama(tmp_path / "deep", num_hidden_layers=3)
        adapter = train_adapter(deep, tmp_path / "adapter", target_modules=["q_proj"])
        with pytest.raises(MergetuneError, match=r"layers\.2\.self_attn\.q_proj.weight: no such"):
            open_expert("tuned", adapter, Checkpoint(tiny_base))

    @pytest.mark.parametrize(("lost", "kept"), ["AB", "BA"])
    def test_half_a_pair(self, tiny_base: Path, copied: Path, lost: str, kept: str) -> None:
        key = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{lost}.weight"
        edit_tensors(copied, **{key: None})
        with pytest.raises(MergetuneError, match=f"LoRA's {kept} stands without its {lost}"):
            open_expert("tuned", copied, Checkpoint(tiny_base))

    @pytest.mark.parametrize("shape", [(3, 32), (0,), ()])
    def test_factors_that_do_not_fit_each_other(
        self, tiny_base: Path, copied: Path, shape: tuple[int, ...]
    ) -> None:
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        edit_tensors(copied, **{key: torch.ones(shape)})
        reason = re.escape(f"A has shape {shape} and B (32, 4)")
        with pytest.raises(MergetuneError, match=reason):
            open_expert("tuned", copied, Checkpoint(tiny_base))

    def test_pickled_adapter(self, tiny_base: Path, copied: Path) -> None:
        path = copied / "adapter_model.safetensors"
        torch.save(load_file(path), copied / "adapter_model.bin")
        path.unlink()
        with pytest.raises(MergetuneError, match=r"adapter_model\.bin.*execute.*save_pretrained"):
            open_expert("tuned", copied, Checkpoint(tiny_base))

    def test_truncated_adapter(self, tiny_base: Path, copied: Path) -> None:
        path = copied / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(MergetuneError, match=r"adapter_model\.safetensors: is damaged"):
            open_expert("tuned", copied, Checkpoint(tiny_base))
