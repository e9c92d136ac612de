"""Architectures beyond Llama, tiny and real: roles and layers by name, merges, engine, written model."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from helpers import build_tokenizer, fine_tune, merge_at, merge_with_peft, train_adapter
from mergetune.engines.engine import EngineConfig
from mergetune.engines.stored_weights import StoredWeights
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.files.library import presets
from mergetune.merging.inputs import open_inputs
from mergetune.space.recipe import Role, count_layers, tensor_place
from mergetune.space.search_space_config import layer_groups, read_search_space
from mergetune.weights.checkpoint import Checkpoint
from mergetune.weights.writer import write_model

PRESETS = list(presets("search_spaces").values())
GRID = 2**12  # weights on a grid of 1/GRID: their sums and differences are exact in float32
IDS = torch.arange(3, 43).reshape(2, 20)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD_DIM = {"head_dim": 8}
MOE = {"moe_intermediate_size": 16}
MHA = {"num_key_value_heads": 4}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTING = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A model type, the config of a tiny one, and by hand the role of each kind of tensor.

    A kind is a name without its `.weight` or `.bias`; `#` stands for a number, `L` for the prefix of
    a layer, `{a,b}` for one of several parts.
    """

    config: dict[str, Any]
    layer: str
    roles: dict[Role, str]
    lora_targets: str | tuple[str, ...] = "all-linear"


QKVO = "L.self_attn.{q,k,v,o}_proj"
GATED = "L.mlp.{gate,up,down}_proj"
TWO_NORMS = "L.{input,post_attention}_layernorm model.norm"
FOUR_NORMS = f"{TWO_NORMS} L.{{pre,post}}_feedforward_layernorm"
QK_NORMS = "L.self_attn.{q,k}_norm"
ROUTED = "L.mlp.gate L.mlp.experts.#.{gate,up,down}_proj"
SHARED_V3 = "L.mlp.gate.e_score_correction_bias L.mlp.shared_experts.{gate,up,down}_proj"
SHARED = "L.mlp.shared_expert_gate L.mlp.shared_expert.{gate,up,down}_proj"
LORA_BESIDE_EXPERTS = ("q_proj", "k_proj", "v_proj", "o_proj")
IN, OUT = "model.embed_tokens", "lm_head"
LLAMA: dict[Role, str] = {"embeddings": IN, "attention": QKVO, "mlp": GATED, "norms": TWO_NORMS, "head": OUT}

FAMILIES = {
    "llama": Family(SIZES, "model.layers.#", LLAMA),
    "mistral": Family(SIZES, "model.layers.#", LLAMA),
    "qwen2": Family(SIZES, "model.layers.#", LLAMA),
    "qwen3": Family(SIZES | HEAD_DIM, "model.layers.#", LLAMA | {"norms": f"{TWO_NORMS} {QK_NORMS}"}),
    "gemma2": Family(SIZES | HEAD_DIM, "model.layers.#", LLAMA | {"norms": FOUR_NORMS, "head": ""}),
    "gemma3_text": Family(
        SIZES | HEAD_DIM, "model.layers.#", LLAMA | {"norms": f"{FOUR_NORMS} {QK_NORMS}", "head": ""}
    ),
    "phi": Family(
        SIZES,
        "model.layers.#",
        {
            "embeddings": IN,
            "attention": "L.self_attn.{q,k,v}_proj L.self_attn.dense",
            "mlp": "L.mlp.fc{1,2}",
            "norms": "L.input_layernorm model.final_layernorm",
            "head": OUT,
        },
    ),
    "phi3": Family(
        SIZES,
        "model.layers.#",
        LLAMA | {"attention": "L.self_attn.qkv_proj L.self_attn.o_proj", "mlp": "L.mlp.{gate_up,down}_proj"},
    ),
    "gpt2": Family(
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "transformer.h.#",
        {
            "embeddings": "transformer.wte transformer.wpe",
            "attention": "L.attn.c_{attn,proj}",
            "mlp": "L.mlp.c_{fc,proj}",
            "norms": "L.ln_{1,2} transformer.ln_f",
        },
    ),
    "gpt_neox": Family(
        SIZES,
        "gpt_neox.layers.#",
        {
            "embeddings": "gpt_neox.embed_in",
            "attention": "L.attention.{query_key_value,dense}",
            "mlp": "L.mlp.dense_{h_to_4h,4h_to_h}",
            "norms": "L.{input,post_attention}_layernorm gpt_neox.final_layer_norm",
            "head": "embed_out",
        },
    ),
    "opt": Family(
        SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "model.decoder.layers.#",
        {
            "embeddings": "model.decoder.embed_{tokens,positions}",
            "attention": "L.self_attn.{q,k,v,out}_proj",
            "mlp": "L.fc{1,2}",
            "norms": "L.{self_attn,final}_layer_norm model.decoder.final_layer_norm",
        },
    ),
    "falcon": Family(
        SIZES,
        "transformer.h.#",
        {
            "embeddings": "transformer.word_embeddings",
            "attention": "L.self_attention.{query_key_value,dense}",
            "mlp": "L.mlp.dense_{h_to_4h,4h_to_h}",
            "norms": "L.input_layernorm transformer.ln_f",
        },
    ),
    "mixtral": Family(
        SIZES | {"num_local_experts": 4},
        "model.layers.#",
        LLAMA | {"mlp": "L.block_sparse_moe.gate L.block_sparse_moe.experts.#.w{1,2,3}"},
        LORA_BESIDE_EXPERTS,
    ),
    "qwen2_moe": Family(
        SIZES | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 32},
        "model.layers.#",
        LLAMA | {"mlp": f"{ROUTED} {SHARED}"},
        LORA_BESIDE_EXPERTS,
    ),
    "qwen3_moe": Family(
        SIZES | HEAD_DIM | MOE | {"num_experts": 4, "num_experts_per_tok": 2},
        "model.layers.#",
        LLAMA | {"mlp": ROUTED, "norms": f"{TWO_NORMS} {QK_NORMS}"},
        LORA_BESIDE_EXPERTS,
    ),
    "deepseek_v3": Family(
        SIZES | MHA | MOE | MLA | ROUTING | {"first_k_dense_replace": 1},
        "model.layers.#",
        LLAMA
        | {
            "attention": "L.self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj}",
            "mlp": f"{GATED} {ROUTED} {SHARED_V3}",
            "norms": f"{TWO_NORMS} L.self_attn.{{q,kv}}_a_layernorm",
        },
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ),
    "gpt_oss": Family(
        SIZES | HEAD_DIM | {"num_local_experts": 4},
        "model.layers.#",
        LLAMA
        | {
            "attention": f"{QKVO} L.self_attn.sinks",
            "mlp": "L.mlp.router L.mlp.experts.{gate_up,down}_{proj,proj_bias}",
        },
    ),
    "mamba": Family(
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "backbone.layers.#",
        {
            "embeddings": "backbone.embeddings",
            "attention": "L.mixer.{A_log,D,conv1d,dt_proj,in_proj,out_proj,x_proj}",
            "norms": "L.norm backbone.norm_f",
        },
        lora_targets=("in_proj", "x_proj"),
    ),
}


def kinds(family: Family, role: Role) -> set[str]:
    """Spell out the kinds of tensor that a family has in this role."""
    found = set()
    for pattern in family.roles.get(role, "").split():
        head, *rest = re.split(r"\{([^}]*)\}", re.sub(r"^L\b", family.layer, pattern))
        spelt = [head]
        for parts, between in zip(rest[::2], rest[1::2], strict=True):
            spelt = [f"{start}{part}{between}" for start in spelt for part in parts.split(",")]
        found |= set(spelt)
    return found


def kind_of(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", re.sub(r"\.(weight|bias)$", "", name))


def on_grid(folder: Path) -> Path:
    """Round the weights of a model, so that base + (expert − base) is exactly the expert."""
    path = folder / "model.safetensors"
    rounded = {name: (tensor * GRID).round() / GRID for name, tensor in load_file(path).items()}
    save_file(rounded, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a family's name to its base, a fine-tune and an adapter, built once."""

    @cache
    def build(name: str) -> tuple[Path, Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        tokenizer = build_tokenizer()
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        config = transformers.AutoConfig.for_model(
            name, vocab_size=len(tokenizer), **ids, **FAMILIES[name].config
        )
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM  # `from_config` has no types
        auto.from_config(config).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        base = on_grid(folder / "base")
        expert = on_grid(fine_tune(base, folder / "expert", seed=1, std=0.004))
        tokenizer.save_pretrained(expert)  # transformers gives Qwen2 another pre-tokenizer
        targets = FAMILIES[name].lora_targets
        adapter = train_adapter(
            base,
            folder / "adapter",
            r=4,
            lora_alpha=8,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        return base, expert, adapter

    return build


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def in_engine(base: Path, tensors: dict[str, Tensor]) -> Any:
    """Load a candidate into a living engine of the base; return the engine's model."""
    engine = TransformersEngine(EngineConfig(device="cpu"), base)
    engine.replace(tensors.items())
    return engine.model


family_names = pytest.mark.parametrize("name", FAMILIES)


@family_names
def test_roles_and_layers_are_read_off_the_names(built: Any, name: str) -> None:
    family = FAMILIES[name]
    checkpoint = Checkpoint(built(name)[0])
    found: dict[Role | None, set[str]] = {}
    for tensor in checkpoint.names:
        place = tensor_place(tensor)
        found.setdefault(place.role, set()).add(kind_of(tensor))
        in_layer = re.match(family.layer.replace("#", r"(\d+)"), tensor)
        assert place.layer == (int(in_layer[1]) if in_layer else None)
    assert found == {role: kinds(family, role) for role in family.roles if kinds(family, role)}
    assert count_layers(checkpoint.names) == 2


@family_names
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_takes_every_tensor_exactly_once(built: Any, name: str, preset: Path) -> None:
    names = Checkpoint(built(name)[0]).names
    assert layer_groups(read_search_space(preset), names)  # refuses orphans and tensors taken twice


@family_names
def test_a_fine_tune_at_lambda_one_comes_back_bit_by_bit(built: Any, name: str, tmp_path: Path) -> None:
    base, expert, _ = built(name)
    inputs = open_inputs(base, {"tuned": expert})
    assert not inputs.warnings
    merged = merge_at(inputs, tuned=1.0)
    tuned = Checkpoint(expert)
    assert all(torch.equal(tensor, tuned.tensor(key)) for key, tensor in merged.items())
    expected = logits(AutoModelForCausalLM.from_pretrained(expert))
    assert torch.equal(logits(in_engine(base, merged)), expected)
    write_model(tmp_path / "out", merged.items(), inputs.base)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(base)), expected)


@family_names
def test_an_adapter_at_lambda_one_is_what_peft_merges(built: Any, name: str) -> None:
    base, _, adapter = built(name)
    merged = merge_at(open_inputs(base, {"lora": adapter}), lora=1.0)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(merge_with_peft(base, adapter))
    ours = logits(in_engine(base, merged))
    torch.testing.assert_close(ours, logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("parameters", [FUSED, FUSED[:1], FUSED[1:]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {FUSED[1]: 3}}])
def test_adapters_of_a_mixture_s_fused_experts_are_what_peft_merges(
    built: Any, tmp_path: Path, name: str, parameters: list[str], options: dict[str, Any]
) -> None:
    """transformers has the experts of a mixture as one parameter; the file may have them one by one."""
    base, _, _ = built(name)
    adapter = train_adapter(
        base, tmp_path / "adapter", r=3, target_modules=["q_proj"], target_parameters=parameters, **options
    )
    merged = merge_at(open_inputs(base, {"lora": adapter}), lora=1.0)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(merge_with_peft(base, adapter))
    torch.testing.assert_close(logits(in_engine(base, merged)), logits(model), rtol=1e-4, atol=1e-5)
    before = Checkpoint(base)
    changed = {kind_of(key) for key, tensor in merged.items() if not torch.equal(tensor, before.tensor(key))}
    is_one = {"gate_up": any("gate_up" in each for each in parameters), "down": FUSED[1] in parameters}
    gates, downs = (
        r"experts\.(#\.(gate_proj|up_proj|w1|w3)|gate_up_proj)$",
        r"experts\.(#\.(down_proj|w2)|down_proj)$",
    )
    assert any(re.search(gates, kind) for kind in changed) == is_one["gate_up"]
    assert any(re.search(downs, kind) for kind in changed) == is_one["down"]


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", 3, "attention"),  # DBRX
        ("transformer.blocks.3.norm_attn_norm.norm_1.weight", 3, "norms"),
        ("transformer.h.4.ln_attn.weight", 4, "norms"),  # Falcon 40B
        ("transformer.encoder.layers.2.self_attention.query_key_value.weight", 2, "attention"),  # ChatGLM
        ("transformer.output_layer.weight", None, "head"),
        ("model.tok_embeddings.weight", None, "embeddings"),  # InternLM2
        ("model.layers.0.attention.wqkv.weight", 0, "attention"),
        ("model.layers.0.feed_forward.w1.weight", 0, "mlp"),
        ("output.weight", None, "head"),
        ("model.layers.5.block_sparse_moe.input_linear.weight", 5, "mlp"),  # Granite MoE
        ("model.layers.5.linear_attn.conv1d.weight", 5, "attention"),  # Qwen3-Next
        ("model.layers.1.conv.conv.weight", 1, "attention"),  # LFM2
        ("backbone.layers.7.mixer.up_proj.weight", 7, "mlp"),  # Nemotron-H
        ("backbone.layers.7.mixer.A_log", 7, "attention"),
        ("rwkv.blocks.0.pre_ln.weight", 0, "norms"),
        ("language_model.model.layers.1.mlp.up_proj.weight", 1, "mlp"),
    ],
)
def test_names_of_further_architectures(name: str, layer: int | None, role: Role) -> None:
    place = tensor_place(name)
    assert (place.layer, place.role) == (layer, role)


def without_prefix(model: Path, folder: Path) -> Path:
    """Copy a GPT-2 with the names that the hub has: `h.0.ln_1.weight`."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("side", ["base", "expert"])
def test_a_prefix_that_only_one_side_has_is_overlooked(built: Any, tmp_path: Path, side: str) -> None:
    base, expert, adapter = built("gpt2")
    if side == "base":
        base = without_prefix(base, tmp_path / "short")
    else:
        expert = without_prefix(expert, tmp_path / "short")
    merged = merge_at(open_inputs(base, {"tuned": expert}), tuned=1.0)
    assert ("h.0.ln_1.weight" in merged) == (side == "base")
    expected = logits(AutoModelForCausalLM.from_pretrained(expert))
    assert torch.equal(logits(in_engine(base, merged)), expected)
    adapted = merge_at(open_inputs(base, {"lora": adapter}), lora=1.0)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(merge_with_peft(base, adapter))
    torch.testing.assert_close(logits(in_engine(base, adapted)), logits(model), rtol=1e-4, atol=1e-5)


def test_an_adapter_of_single_experts_from_transformers_4(built: Any, tmp_path: Path) -> None:
    """transformers 5 fuses the experts of a mixture, but older adapters name them as the files do."""
    base, _, adapter = built("qwen3_moe")
    shutil.copytree(adapter, tmp_path / "old")
    config = json.loads((adapter / "adapter_config.json").read_text())
    modules = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config | modules))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in Checkpoint(base).names:
        if ".experts." in name:
            out, into = Checkpoint(base).shape(name)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, into, generator=generator) / 10
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, 4, generator=generator) / 10
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    merged = merge_at(open_inputs(base, {"lora": tmp_path / "old"}), lora=1.0)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.load_state_dict(merge_with_peft(base, tmp_path / "old"))
    torch.testing.assert_close(logits(in_engine(base, merged)), logits(model), rtol=1e-4, atol=1e-5)


def test_tensors_that_transformers_leaves_out_stay_the_base_s(built: Any, tmp_path: Path) -> None:
    """DeepSeek-V3 ships a layer for multi-token prediction, which no fine-tune by transformers has."""
    base, expert, _ = built("deepseek_v3")
    extra = "model.layers.61.eh_proj.weight"
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(path), extra: torch.ones(32, 64)}, path, metadata={"format": "pt"})
    inputs = open_inputs(tmp_path / "base", {"tuned": expert})
    (warning,) = inputs.warnings
    assert f"lacks {extra}, which transformers leaves out" in warning
    merged = merge_at(inputs, tuned=1.0)
    assert torch.equal(merged[extra], torch.ones(32, 64))
    expected = logits(AutoModelForCausalLM.from_pretrained(expert))
    assert torch.equal(logits(in_engine(tmp_path / "base", merged)), expected)


def test_an_engine_that_cannot_swap_a_weight_says_so(built: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(built("llama")[0])
    model._weight_conversions = [
        WeightConverter("mlp.up_gate_proj", ["mlp.up_proj", "mlp.gate_proj"], operations=[Chunk(dim=0)])
    ]
    with pytest.raises(MergetuneError, match=r"another form of .*up_gate_proj.*cannot be swapped"):
        StoredWeights(model)
