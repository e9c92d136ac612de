"""Model directories, read lazily as a base or an expert."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.weights.architecture import Architecture
from mergetune.weights.low_rank import LowRank
from mergetune.weights.tensor_files import INDEX, STACK_FILE, open_weights, read_json

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_HEAD_BIAS = re.compile(r"(^|\.)(lm_head|embed_out)\.bias$")
_EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|wte|embed_in|word_embeddings|embeddings)\.weight$"
)
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_packed|weight_scale(_inv)?)$|\.quant_state\."
)

# to what a model answers
_IRRELEVANT = (INDEX, STACK_FILE, "mergekit_config.json")
_RELEVANT = (".json", ".jinja", ".model", ".txt")


class Checkpoint:
    """A model directory read lazily: config, and tensors from one or many safetensors files.

    Attributes:
        folder: the directory.
        config: its `config.json`.
        names: the tensors in file order; a head that only repeats the embeddings is left out, and
            so are buffers that follow from the config.
        is_tied: whether the embeddings are the head, too.

    Args:
        folder: the directory.
        may_be_quantized: whether it is only scored; what is quantized cannot be merged.

    Raises:
        MergetuneError: the folder or a file is missing, damaged, quantized or not safetensors.
    """

    folder: Path
    config: dict[str, Any]
    names: tuple[str, ...]
    is_tied: bool

    def __init__(self, folder: Path, *, may_be_quantized: bool = False) -> None:
        if not folder.is_dir():
            raise MergetuneError(
                f"{folder}: is no directory. Give the directory that `save_pretrained` wrote, or "
                "download the model with `hf download OWNER/NAME --local-dir …`."
            )
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self._files = open_weights(folder)
        if not may_be_quantized:
            self._refuse_quantized()
        left_out = {*self._computed_buffers(), self._duplicate_head()}
        self.names = tuple(name for name in self._files.names if name not in left_out)
        self.is_tied = not any(is_head(name) for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._files.view(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self._files.view(name).dtype

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a fresh CPU tensor in this dtype, or else as it is stored."""
        return self._files.view(name).to(dtype or self.dtype(name), copy=True)

    def view(self, name: str) -> Tensor:
        """Return a tensor as it is mapped from its file: read only, and no copy."""
        return self._files.view(name)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(self._files.view(name).nbytes for name in self.names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the tensors, independent of sharding."""
        return self._files.digest(self.names)

    @cached_property
    def architecture(self) -> Architecture | None:
        """What transformers makes of its tensors; None where it does not know the architecture."""
        try:
            return Architecture(self.folder, self.names)
        except Exception:  # whatever a class raises at values of config.json that it does not expect
            return None

    @cached_property
    def repeats_embeddings(self) -> bool:
        """Whether a head is stored and equals the embeddings, whatever the config says."""
        head, embeddings = (next(filter(k, self._files.names), None) for k in (is_head, is_embeddings))
        if head is None or embeddings is None:
            return False
        return torch.equal(self._files.view(head), self._files.view(embeddings))

    def _refuse_quantized(self) -> None:
        configs = (self.config, self.config.get("text_config") or {})
        reasons = [
            f"`{key}` in config.json"
            for config in configs
            for key in ("quantization_config", "compression_config")
            if config.get(key)
        ]
        reasons += [f"tensor `{name}`" for name in self._files.names if self._is_quantized(name)]
        if reasons:
            raise MergetuneError(
                f"{self.folder}: weights must not be quantized, since quantized numbers cannot be "
                f"added, but these are ({reasons[0]}). Give the model as it was before, in "
                "bfloat16 or float16, and quantize the merged model instead."
            )

    def _is_quantized(self, name: str) -> bool:
        dtype = self.dtype(name)
        coarse = not dtype.is_floating_point or dtype.itemsize == 1  # integers, float8
        return _QUANTIZED.search(name) is not None or (coarse and name.endswith(".weight"))

    def _computed_buffers(self) -> list[str]:
        """Return the causal masks and rotary frequencies that old versions of transformers stored.

        A bias with one dimension is a learned one.
        """
        computed = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.position_ids$")
        masks = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
        return [
            name
            for name in self._files.names
            if computed.search(name) or (masks.search(name) and self._files.view(name).ndim != 1)
        ]

    def _duplicate_head(self) -> str | None:
        """Return the stored head if it only repeats the embeddings, and the config does not untie them.

        transformers ties by the config and only if the values are equal, vLLM by the config alone,
        and the default where the config is silent depends on the architecture: so equal values
        decide, and a config that ties what differs is refused.
        """
        head = next(filter(is_head, self._files.names), None)
        embeddings = next(filter(is_embeddings, self._files.names), None)
        nested = self.config.get("text_config") or {}
        says_tied = self.config.get("tie_word_embeddings", nested.get("tie_word_embeddings"))
        if head is None or embeddings is None or says_tied is False:
            return None
        if self.repeats_embeddings:
            return head
        if says_tied:
            raise MergetuneError(
                f"{self.folder}: config.json says `tie_word_embeddings: true`, but `{head}` "
                f"differs from `{embeddings}`, so it is unclear which one counts. If the head was "
                "trained on its own, set `tie_word_embeddings: false` in config.json."
            )
        return None


class Expert(Protocol):
    """A fine-tune of the base, seen as what it adds to each of the base's tensors."""

    @property
    def name(self) -> str:
        """The user's name for it, e.g. `tools`."""

    @property
    def folder(self) -> Path:
        """Where it was read from."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The base's tensors that it changes."""

    @property
    def digest(self) -> str:
        """SHA-256 of everything that, with the base, determines its task vector."""

    def weights(self, name: str) -> Tensor | None:
        """Return the expert's own tensor, read only and in its own dtype, where it has one.

        None where it leaves the base's as it is, or only adds to it.
        """

    def factors(self, name: str) -> LowRank | None:
        """Return the factors of what it adds to the base's tensor, in that one's layout.

        None where it does not just add a product of two matrices.
        """

    def task_vector(self, name: str, base: Tensor) -> Tensor | None:
        """Return expert − base in float32, or None where the expert leaves the tensor as it is."""


@dataclass(frozen=True)
class FullExpert:
    """A full fine-tuned checkpoint as an expert; `names` is as `match_names` gives it, or all alike."""

    name: str
    checkpoint: Checkpoint
    names: Mapping[str, str] | None = None

    @cached_property
    def own_names(self) -> Mapping[str, str]:
        """The base's name → the checkpoint's own of every tensor in common."""
        return {name: name for name in self.checkpoint.names} if self.names is None else self.names

    @property
    def folder(self) -> Path:
        """Where it was read from."""
        return self.checkpoint.folder

    @property
    def targets(self) -> tuple[str, ...]:
        """The base's tensors that it changes: all that it has."""
        return tuple(self.own_names)

    @property
    def digest(self) -> str:
        """SHA-256 of the checkpoint's tensors."""
        return self.checkpoint.digest

    def weights(self, name: str) -> Tensor | None:
        """Return the tensor as it is mapped from its file: read only."""
        return self.checkpoint.view(self.own_names[name]) if name in self.own_names else None

    def factors(self, name: str) -> None:
        """Return nothing: it holds weights."""

    def task_vector(self, name: str, base: Tensor) -> Tensor | None:
        """Return expert − base in float32, on the device of `base`."""
        weights = self.weights(name)
        return None if weights is None else weights.to(torch.float32, copy=True).to(base.device).sub_(base)


def answers_digest(folder: Path, weights: str, *others: str) -> str:
    """Return the SHA-256 of all that a model's answers depend on.

    Args:
        folder: holds configuration, tokenizer and chat template.
        weights: a digest of the weights.
        others: what else they depend on.
    """
    total = hashlib.sha256("".join([weights, *others]).encode())
    for file in sorted(folder.iterdir()):
        if file.suffix in _RELEVANT and file.name not in _IRRELEVANT:
            total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def match_names(base: Checkpoint, theirs: Sequence[str]) -> dict[str, str]:
    """Return the base's name → their name of every tensor in common.

    Names differ between versions of transformers, and between a file, the model in memory and its language
    part alone; transformers' own tables tell which are one. A prefix that only one side has is overlooked if
    all tensors of a side find a partner then: GPT-2 is stored as `h.0.ln_1.weight` on the hub, as
    `transformer.h.0.ln_1.weight` since.
    """
    ours, known = base.names, set(theirs)
    common = {name: name for name in ours if name in known}
    strays = [name for name in theirs if name not in common]
    if strays and base.architecture is not None:
        common |= base.architecture.pair([name for name in ours if name not in common], strays)
    found = set(common.values())
    our_strays = dict.fromkeys(name for name in ours if name not in common)
    their_strays = dict.fromkeys(name for name in theirs if name not in found)
    added, removed = _find_prefix(their_strays, our_strays), _find_prefix(our_strays, their_strays)
    partners = {name: added + name if added else name.removeprefix(removed) for name in our_strays}
    renamed = {name: partner for name, partner in partners.items() if partner in their_strays}
    return common | renamed if len(common) + len(renamed) in (len(ours), len(theirs)) else common


def _find_prefix(longer: Collection[str], shorter: Collection[str]) -> str:
    """Return what must be taken from the front of one of the longer names to get a shorter one."""
    for name in longer:
        rest = name
        while rest := rest.partition(".")[2]:
            if rest in shorter:
                return name.removesuffix(rest)
    return ""


def is_head(name: str) -> bool:
    """Say whether a tensor is the matrix from hidden states to logits."""
    return _HEAD.search(name) is not None


def is_embeddings(name: str) -> bool:
    """Say whether a tensor is the matrix of token embeddings."""
    return _EMBEDDINGS.search(name) is not None


def has_token_rows(name: str) -> bool:
    """Say whether a tensor has one row for each token: embeddings, head, the head's bias."""
    return is_embeddings(name) or is_head(name) or _HEAD_BIAS.search(name) is not None
