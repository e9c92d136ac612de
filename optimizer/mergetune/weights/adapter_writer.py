"""An adapter written in peft's format, from low-rank updates of layers; vLLM serves it, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mergetune.weights.adapter import CONFIG, PREFIX, WEIGHTS
from mergetune.weights.architecture import Layer
from mergetune.weights.low_rank import LowRank
from mergetune.weights.writer import replacing_folder

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM 0.32, `MaxLoRARanks` in config/lora.py
_FACTORS = {  # peft's names of A and B
    "linear": ("lora_A.weight", "lora_B.weight"),
    "conv1d": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}


def write_adapter(
    folder: Path, updates: Mapping[Layer, LowRank], base: str, notes: Mapping[str, str] | None = None
) -> None:
    """Write an adapter in float32, whole or not at all.

    The scale alpha / rank is 1 in every layer: what the experts' scales and lambdas were is in B.

    Args:
        folder: where to; an adapter or a model that is there is replaced.
        updates: what is added to each layer's weight.
        base: the model that it belongs to: a directory, or a hub id with or without `@revision`.
        notes: further text files by name.

    Raises:
        MergetuneError: `folder` holds something else, or the disk is too small.
    """
    tensors: dict[str, Tensor] = {}
    for layer, update in updates.items():
        a, b = (f"{PREFIX}{layer.path}.{factor}" for factor in _FACTORS[layer.kind])
        tensors |= {a: update.a.contiguous(), b: update.b.contiguous()}
    with replacing_folder(folder.resolve(), sum(each.nbytes for each in tensors.values())) as temporary:
        (temporary / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        config = json.dumps(_config(updates, base), indent=2, ensure_ascii=False)
        (temporary / CONFIG).write_text(f"{config}\n", encoding="utf-8")
        for name, text in (notes or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def served_rank(rank: int) -> int | None:
    """Return the `max_lora_rank` that vLLM pads this rank to; None where it takes none so high."""
    return next((each for each in _VLLM_RANKS if each >= rank), None)


def _config(updates: Mapping[Layer, LowRank], base: str) -> dict[str, Any]:
    """Return `adapter_config.json`: the rank that most layers have, and by pattern those of the others."""
    ranks = {layer.path: update.rank for layer, update in updates.items()}
    rank = max(Counter(sorted(ranks.values(), reverse=True)).items(), key=lambda item: item[1])[0]
    others = {path: own for path, own in ranks.items() if own != rank}
    name, _, revision = base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "fan_in_fan_out": any(layer.kind == "conv1d" for layer in updates),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
