"""What an engine has to know of a model's weights before it reads them: their dtype and their size."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from mergetune.weights.tensor_files import open_weights, read_json

_COMPUTED_IN = {"float32", "bfloat16", "float16"}
_PACKED = 8  # four-bit weights in an integer of compressed-tensors


@dataclass(frozen=True)
class WeightFacts:
    """The dtype that an engine computes in, and the bytes that the weights take in it, unpacked.

    `dtype` is what was asked for; of `auto`, the one that most of the stored bytes have, in every engine
    alike: what is scored is then what is written. Where that is no dtype to compute in, as in a quantized
    model, it is the one in config.json, and `auto` where none is there.
    """

    dtype: str
    nbytes: int

    @classmethod
    def read(cls, folder: Path, wanted: str) -> WeightFacts:
        """Read the headers of a model directory's weights; raises `MergetuneError` as `open_weights` does."""
        files = open_weights(folder)
        sizes: Counter[torch.dtype] = Counter()
        counts: Counter[torch.dtype] = Counter()
        for name in files.names:
            view = files.view(name)
            sizes[view.dtype] += view.nbytes
            counts[view.dtype] += _count(name, view)
        stored = str(max(sizes, key=sizes.__getitem__, default=torch.float32)).removeprefix("torch.")
        if stored not in _COMPUTED_IN:
            config = read_json(folder / "config.json")
            stored = str(config.get("dtype") or config.get("torch_dtype"))
        dtype = wanted if wanted != "auto" else stored if stored in _COMPUTED_IN else "auto"
        if dtype == "auto":
            return cls(dtype, sum(sizes.values()))
        floats = sum(counts.values()) * getattr(torch, dtype).itemsize
        others = sum(size for each, size in sizes.items() if not counts[each])
        return cls(dtype, floats + others)


def _count(name: str, view: torch.Tensor) -> int:
    """Return how many numbers of the computed dtype a stored tensor becomes; none if it is no weight."""
    if name.endswith(".weight_packed"):
        return view.numel() * _PACKED
    return view.numel() if view.is_floating_point() or name.endswith(".weight") else 0
