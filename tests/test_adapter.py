from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build_llama, merge_with_peft, train_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from optimizer.errors import MergetuneError
from optimizer.merging.adapter import LoraExpert, open_expert
from optimizer.merging.checkpoint import Checkpoint, FullExpert

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
    for name in base.names:
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
    ],
    ids=["plain", "patterns", "rslora", "modules_to_save", "norms", "embedding", "orthogonal"],
)
def test_task_vector_is_what_peft_merges(
    tiny_base: Path, tmp_path: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    adapter = train_adapter(tiny_base, tmp_path / "adapter", dtype=dtype, **config)
    stored = load_file(adapter / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {dtype}
    assert_merges_like_peft(tiny_base, adapter)


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
    assert ("transformer.h.0.attn.c_attn.bias" in expert.targets) == (bias != "none")


def test_embeddings_of_a_tied_base(tiny_tied_base: Path, tmp_path: Path) -> None:
    adapter = train_adapter(tiny_tied_base, tmp_path / "adapter", target_modules=["embed_tokens"])
    assert_merges_like_peft(tiny_tied_base, adapter)


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
            ({"use_dora": True}, "DoRA"),
            ({"lora_bias": True}, "biases"),
            ({"trainable_token_indices": [1]}, "single rows"),
            ({"alora_invocation_tokens": [1]}, "some tokens only"),
            ({"target_parameters": ["experts.up_proj"]}, "without a module"),
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

    def test_real_dora(self, tiny_base: Path, tmp_path: Path) -> None:
        train_adapter(tiny_base, tmp_path, target_modules=["q_proj"], use_dora=True)
        base = Checkpoint(tiny_base)
        with pytest.raises(MergetuneError, match="DoRA"):
            open_expert("tuned", tmp_path, base)
        edit_config(tmp_path, use_dora=False)
        with pytest.raises(MergetuneError, match="holds `lora_magnitude_vector`: DoRA"):
            open_expert("tuned", tmp_path, base)

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
        with pytest.raises(
            MergetuneError, match=r"saved with 321 rows, but the base has 320.*tiny-base.*`vocabulary: base`"
        ):
            open_expert("tuned", copied, Checkpoint(tiny_base))

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
