"""The depth of a model as mergekit goes through it: before the layers, each layer, after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from mergetune.errors import MergetuneError
from mergetune.files.library import placed
from mergetune.importing.parameters import Names
from mergetune.space.recipe import OUTSIDE_LAYERS, ROLES
from mergetune.weights.models import check_reference
from mergetune.weights.tensor_files import DEPTH_KEYS, read_json

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A part of the depth: layers (first and last), or what lies outside them, or all there is.

    `slice` is the slice of a merge whose settings hold here, and `t` ∈ [0, 1] how far in its gradients.
    """

    where: Literal["all", "outside", "before", "after", "layers"]
    slice: int = 0
    t: float = 0.0
    layers: tuple[int, int] | None = None

    def selectors(self, names: Names) -> dict[str, Any]:
        """Return name and selectors of the layer group of this part's tensors with these names."""
        first, last = self.layers or (0, 0)
        name = (
            self.where
            if self.layers is None
            else f"layer{first}"
            if first == last
            else f"layers{first}-{last}"
        )
        found: dict[str, Any] = {"name": name}
        if names.contained or names.lacking:
            found["name"] += f"-{'-'.join(names.contained) or 'rest'}"
        if self.layers is not None:
            found["layers"] = [first, last]
        elif self.where == "before":
            found["roles"] = ["embeddings"]
        elif self.where == "after":
            found["roles"] = [role for role in ROLES if role not in ("embeddings", "vision")]
        outside = OUTSIDE_LAYERS if self.where in ("outside", "before", "after") else ""
        if names.pattern or outside:
            found["match"] = (outside or "^") + names.pattern
        return found


def parts_of(lengths: Sequence[int]) -> list[Part]:
    """Return the parts of a model whose slices have so many layers each.

    As in mergekit, layer i of n of a slice stands at t = i / (n - 1), and at 1 where it is the only one; what
    lies before the layers stands at 0 of the first slice, what lies after them at 0 of the last.
    """
    parts, offset = [Part("before")], 0
    for number, length in enumerate(lengths):
        for i in range(length):
            t = i / (length - 1) if length > 1 else 1.0
            parts.append(Part("layers", number, t, (offset + i, offset + i)))
        offset += length
    return [*parts, Part("after", len(lengths) - 1)]


@dataclass(frozen=True)
class Settled(Generic[T]):
    """A part of the depth with what holds there, for each set of names."""

    part: Part
    found: list[tuple[Names, T]]


def settle(parts: Iterable[Part], find: Callable[[Part], list[tuple[Names, T]]]) -> list[Settled[T]]:
    """Return what holds in each part, neighbours with the same in one."""
    before, *layers, after = [Settled(part, find(part)) for part in parts]
    merged: list[Settled[T]] = []
    for each in layers:
        if merged and merged[-1].found == each.found:
            layers_of_both = (_layers(merged[-1])[0], _layers(each)[1])
            merged[-1] = replace(merged[-1], part=replace(merged[-1].part, layers=layers_of_both))
        else:
            merged.append(each)
    if before.found != after.found:
        return [before, *merged, after]
    if all(each.found == before.found for each in merged):
        return [replace(before, part=replace(before.part, where="all"))]
    return [replace(before, part=replace(before.part, where="outside")), *merged]


def _layers(settled: Settled[Any]) -> tuple[int, int]:
    assert settled.part.layers is not None  # of a layer
    return settled.part.layers


def count_layers_of(reference: str, folder: Path, fetches: bool) -> int | None:
    """Return the number of a model's layers by its config.json; None where that is not at hand.

    Args:
        reference: a directory relative to `folder`, or a hub id.
        folder: the folder that relative paths are taken from.
        fetches: whether the Hub may be asked for the file.

    Raises:
        MergetuneError: it is a model of images and text.
    """
    file = _config_file(reference, folder, fetches)
    if file is None:
        return None
    config = read_json(file)
    if "vision_config" in config or "text_config" in config:
        raise MergetuneError(
            f"{file}: is of a model of images and text, which mergekit merges as a whole: only models of "
            "text can be taken over. Write the recipe by hand, with a layer group for `roles: [vision]`."
        )
    return next((config[key] for key in DEPTH_KEYS if isinstance(config.get(key), int)), None)


def _config_file(reference: str, folder: Path, fetches: bool) -> Path | None:
    place = placed(folder, reference)
    if place.is_dir():
        return place / "config.json" if (place / "config.json").is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        check_reference(reference, folder)
    except MergetuneError:  # it is no hub id
        return None
    name, _, revision = reference.partition("@")
    try:
        return Path(
            hf_hub_download(name, "config.json", revision=revision or None, local_files_only=not fetches)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
