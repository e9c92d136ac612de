"""Safetensors files mapped into memory, and errors that say what is wrong with a damaged one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mergetune.errors import MergetuneError
from mergetune.files.atomic_files import write_text
from mergetune.files.library import in_cache

if TYPE_CHECKING:  # reports read no weights
    from torch import Tensor

_DIGEST = re.compile(r"[0-9a-f]{64}")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # of config.json: how many layers
STACK_FILE = "mergetune_stack.json"  # in a stack's directory: where its tensors are


class TensorFiles:
    """The tensors of one or several safetensors files, mapped into memory and read on demand."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._views: dict[str, Tensor] = {}
        self._stamps: list[tuple[str, int, int, int]] = []
        for path in paths:
            self._views.update(_map_tensors(path))
            found = path.resolve().stat()
            self._stamps.append((str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns))

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors in file order."""
        return tuple(self._views)

    def view(self, name: str) -> Tensor:
        """Return the tensor as it is mapped from its file; whoever writes to it clones it first."""
        return self._views[name]

    def digest(self, names: Iterable[str]) -> str:
        """Return the SHA-256 of these tensors' names, dtypes, shapes and bytes, in sorted order.

        It is kept in the cache, by the files' paths, sizes and times: reading 70B weights takes minutes.
        """
        ordered = sorted(names)
        key = hashlib.sha256(json.dumps([self._stamps, ordered]).encode()).hexdigest()
        kept = in_cache(f"digests/{key}")
        with contextlib.suppress(OSError):
            if _DIGEST.fullmatch(found := kept.read_text(encoding="utf-8")):
                return found
        digest = self._read_digest(ordered)
        with contextlib.suppress(OSError):  # a cache that cannot be written
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, digest)
        return digest

    def _read_digest(self, ordered: Iterable[str]) -> str:
        import torch

        sha = hashlib.sha256()
        for name in ordered:
            view = self._views[name]
            sha.update(json.dumps([name, str(view.dtype), list(view.shape)]).encode())
            sha.update(view.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()


class StackedFiles:
    """The tensors of a stack: those of its models' files, under other names.

    Args:
        place: the stack's file, which names the models' directories and, for every tensor, the number of its
            model and its name there.

    Raises:
        MergetuneError: as `open_weights` does, or a tensor is no longer there.
    """

    def __init__(self, place: Path) -> None:
        marker = read_json(place)
        self._models = [open_weights(Path(folder)) for folder in marker["folders"]]
        self._places: dict[str, tuple[int, str]] = {
            name: (int(model), own) for name, (model, own) in marker["tensors"].items()
        }
        there = [set(model.names) for model in self._models]
        if gone := [name for name, (model, own) in self._places.items() if own not in there[model]]:
            raise MergetuneError(f"{place}: its models no longer have {shortened(gone)}. Run again.")

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors from the bottom of the stack to its top."""
        return tuple(self._places)

    def view(self, name: str) -> Tensor:
        """Return the tensor as it is mapped from its model's file."""
        model, own = self._places[name]
        return self._models[model].view(own)

    def digest(self, names: Iterable[str]) -> str:
        """Return the SHA-256 of which tensor of which model each of these is, and of the models' weights."""
        models = [model.digest(model.names) for model in self._models]
        parts = [[name, models[self._places[name][0]], self._places[name][1]] for name in sorted(names)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_weights(folder: Path) -> TensorFiles | StackedFiles:
    """Open the weights of a model directory: of a stack, or looked for in transformers' order.

    Raises:
        MergetuneError: there are none, they are damaged, or they lack what their index names.
    """
    if (folder / STACK_FILE).exists():
        return StackedFiles(folder / STACK_FILE)
    if (folder / SINGLE).exists():
        return TensorFiles([folder / SINGLE])
    if not (folder / INDEX).exists():
        raise MergetuneError(f"{folder}: {explain_no_weights(folder, SINGLE)}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergetuneError(f"{folder / INDEX}: must hold a `weight_map`. Download it again.")
    if wrong := [shard for shard in weight_map.values() if not isinstance(shard, str) or "/" in shard]:
        raise MergetuneError(
            f"{folder / INDEX}: `weight_map` must name files beside it, but names {wrong[0]!r}. Download it "
            "again."
        )
    shards = [folder / shard for shard in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if not missing:
        files = TensorFiles(shards)
        missing = sorted(set(weight_map) - set(files.names))
    if missing:
        raise MergetuneError(
            f"{folder / INDEX}: names what is not there: {shortened(missing)}. "
            "Download or copy the missing files again."
        )
    return files


def explain_no_weights(folder: Path, wanted: str) -> str:
    """Say why a folder without the file `wanted` cannot be used, and what to do."""
    found = {path.suffix: path.name for path in sorted(folder.iterdir())}
    pickle = next((found[suffix] for suffix in (".bin", ".pt", ".pth") if suffix in found), None)
    if pickle:
        return (
            f"holds only pickled weights ({pickle}), and a pickle can execute code when read. If "
            "you trust its origin, convert it once: load it with `from_pretrained`, then save it "
            "with `save_pretrained` (transformers 4: with `safe_serialization=True`)."
        )
    if ".gguf" in found:
        return (
            f"holds only {found['.gguf']}, and GGUF is a format for inference. Give the "
            "safetensors model that it was made from."
        )
    if ".safetensors" in found:
        return f"holds no {wanted}, but {found['.safetensors']}. Rename that if it is the model."
    return f"holds no weights: {wanted} is missing. Download or copy it again."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `MergetuneError` naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MergetuneError(
            f"{path}: cannot be read ({error.strerror}). Copy it from where the model came from."
        ) from error
    except ValueError as error:
        raise MergetuneError(f"{path}: is not valid JSON ({error}). Download it again.") from error
    if not isinstance(data, dict):
        raise MergetuneError(
            f"{path}: must hold a JSON object, but holds a {type(data).__name__}. Download it again."
        )
    return data


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """Join the first names and count the rest."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """Map a file: the tensors are views of it, and their bytes are read when they are used."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except OSError as error:
        raise MergetuneError(f"{path}: cannot be read ({error}). Download or copy it again.") from error
    except SafetensorError as error:
        raise MergetuneError(f"{path}: {_explain_damage(path, error)}") from error


def _explain_damage(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            return "is a Git LFS pointer, not the weights. Run `git lfs pull` in its repository."
        expected = _expected_bytes(int.from_bytes(start, "little"), file.read(100_000_000))
    sizes = f"{path.stat().st_size} bytes" + (f" of {expected}" if expected else "")
    return f"is damaged or incomplete: {sizes} ({error}). Download or copy it again."


def _expected_bytes(header_bytes: int, following: bytes) -> int | None:
    """Read the size that a safetensors file should have off its header, if that is whole."""
    try:
        header = json.loads(following[:header_bytes])
        ends = [entry["data_offsets"][1] for entry in header.values() if "data_offsets" in entry]
        return 8 + header_bytes + int(max(ends))
    except (ValueError, TypeError, AttributeError, LookupError):
        return None
