"""Model directories: read lazily as a base or an expert, and written whole."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from optimizer.errors import MergetuneError
from optimizer.merging.tensor_files import INDEX, SINGLE, open_weights, read_json

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_packed|weight_scale(_inv)?)$|\.quant_state\."
)
# What a model directory holds beside the weights; a merged model takes it from the base.
_COMPANIONS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "*.py", "LICENSE*"),
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoint:
    """A model directory read lazily: config, and tensors from one or many safetensors files.

    Attributes:
        folder: the directory.
        config: its `config.json`.
        names: the tensors in file order; a head that only repeats the embeddings is left out, and
            so are buffers that follow from the config.
        is_tied: whether the embeddings are the head, too.

    Raises:
        MergetuneError: the folder or a file is missing, damaged, quantized or not safetensors.
    """

    folder: Path
    config: dict[str, Any]
    names: tuple[str, ...]
    is_tied: bool

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise MergetuneError(
                f"{folder}: is no directory. Give the directory that `save_pretrained` wrote, or "
                "download the model with `hf download OWNER/NAME --local-dir …`."
            )
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self._files = open_weights(folder)
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
        masks = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
        return [
            name
            for name in self._files.names
            if name.endswith(".rotary_emb.inv_freq")
            or (masks.search(name) and self._files.view(name).ndim != 1)
        ]

    def _duplicate_head(self) -> str | None:
        """Return the stored head if it only repeats the embeddings.

        transformers ties by the config and only if the values are equal, vLLM by the config alone,
        and the default where the config is silent depends on the architecture: so equal values
        decide, and a config that contradicts the values is refused.
        """
        head = next(filter(is_head, self._files.names), None)
        embeddings = next(filter(is_embeddings, self._files.names), None)
        nested = self.config.get("text_config") or {}
        says_tied = self.config.get("tie_word_embeddings", nested.get("tie_word_embeddings"))
        if head is None or embeddings is None or says_tied is False:
            return None
        if torch.equal(self._files.view(head), self._files.view(embeddings)):
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

    def task_vector(self, name: str, base: Tensor) -> Tensor | None:
        """Return expert − base in float32, or None where the expert leaves the tensor as it is."""


@dataclass(frozen=True)
class FullExpert:
    """A full fine-tuned checkpoint as an expert."""

    name: str
    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        """Where it was read from."""
        return self.checkpoint.folder

    @property
    def targets(self) -> tuple[str, ...]:
        """The base's tensors that it changes: all of them."""
        return self.checkpoint.names

    @property
    def digest(self) -> str:
        """SHA-256 of the checkpoint's tensors."""
        return self.checkpoint.digest

    def weights(self, name: str) -> Tensor:
        """Return the tensor as it is mapped from its file: read only."""
        return self.checkpoint.view(name)

    def task_vector(self, name: str, base: Tensor) -> Tensor:
        """Return expert − base in float32, on the device of `base`."""
        return self.checkpoint.tensor(name, torch.float32).to(base.device).sub_(base)


def is_head(name: str) -> bool:
    """Say whether a tensor is the matrix from hidden states to logits."""
    return _HEAD.search(name) is not None


def is_embeddings(name: str) -> bool:
    """Say whether a tensor is the matrix of token embeddings."""
    return _EMBEDDINGS.search(name) is not None


def write_model(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    like: Checkpoint,
    notes: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model directory: `tensors`, with the config and the tokenizer of `like`.

    `notes` holds further text files by name, such as a model card.

    Shards are written as they fill, to a hidden sibling folder that takes the place of `folder` at
    the very end: after any failure nothing is left behind and an existing `folder` is as it was.

    Raises:
        MergetuneError: `folder` is `like` itself or holds something that is no model, or the disk
            is too small.
    """
    folder = folder.resolve()
    _check_replaceable(folder, like)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(folder.parent, like.nbytes)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _disk_full_explained(folder.parent, like.nbytes):
            for path in _companions(like.folder):
                shutil.copyfile(path, temporary / path.name)
            for name, text in (notes or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
            _write_shards(temporary, tensors, max_shard_bytes)
        temporary.chmod(0o755)  # mkdtemp makes it private
        _move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path, like: Checkpoint) -> None:
    if folder == like.folder.resolve():
        raise MergetuneError(f"{folder}: is the base of the merge. Give another output directory.")
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / "config.json").exists():
        raise MergetuneError(
            f"{folder}: exists and is no model directory, so it is not replaced. Give another "
            "output directory or remove this one."
        )


def _check_space(disk: Path, needed: int) -> None:
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise MergetuneError(
            f"{disk}: the model needs {needed} bytes, but {free} are free. Free "
            f"{needed - free} bytes or give an output directory on another disk."
        )


@contextmanager
def _disk_full_explained(disk: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors keeps the number of the system's error only in its message.
        numbers = re.findall(r"os error (\d+)", str(error)) or [getattr(error, "errno", None)]
        if int(numbers[0] or 0) not in _DISK_FULL:
            raise
        raise MergetuneError(
            f"{disk}: no room for the model ({error}). It needs about {needed} bytes, and "
            f"{shutil.disk_usage(disk).free} were free when writing failed. Nothing is left "
            "behind. Free some space, raise the quota or give an output directory on another disk."
        ) from error


def _companions(folder: Path) -> list[Path]:
    found = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
    """Write shards as they fill; they are named at the end, since a name tells their number."""
    shards: list[list[str]] = []
    total = 0
    for shard in _fill_shards(tensors, max_bytes):
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _fill_shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > max_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor.contiguous()
        filled += tensor.nbytes
    yield shard


def _move_into_place(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; if that fails, `folder` is as it was."""
    old = new.with_name(f"{new.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
