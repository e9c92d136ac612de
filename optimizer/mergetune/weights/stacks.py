"""A stack as a model directory: configuration and tokenizer of its own, weights in its models' files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from mergetune.errors import MergetuneError
from mergetune.files.library import in_cache
from mergetune.space.recipe import tensor_place
from mergetune.space.stack import Stack
from mergetune.weights.adapter import is_adapter
from mergetune.weights.architecture import read_config
from mergetune.weights.checkpoint import Checkpoint, answers_digest, is_embeddings, is_head
from mergetune.weights.compatibility import differing_settings
from mergetune.weights.tensor_files import DEPTH_KEYS, STACK_FILE, shortened
from mergetune.weights.tokenizer_files import read_vocabulary
from mergetune.weights.writer import write_model

_LAYER = re.compile(r"(^|\.)\d+\.")  # the first number is the layer's
_NO_LAYERS = re.compile(r"(architectures|_ids?)$")  # lists that may be as long by chance


def open_stack(stack: Stack, models: Mapping[str, Path]) -> Path:
    """Return the directory of a stack in the cache, written at first use; weights are not copied.

    Args:
        stack: what it is made of, as recipes are to name it.
        models: the directory of every model that it names.

    Raises:
        MergetuneError: a model lacks the layers, or the models do not fit together; all reasons are named.
    """
    parts = _Parts(stack, models)
    if problems := list(parts.problems()):
        raise MergetuneError(f"The stack {stack} cannot be made:" + "".join(f"\n  {x}" for x in problems))
    marker = json.dumps(parts.marker(), indent=1, ensure_ascii=False)
    key = answers_digest(parts.like.folder, marker, json.dumps(parts.config(), sort_keys=True))
    place = in_cache(f"stacks/{key}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):  # two runs write it once
        if not place.is_dir():
            new = place.with_name(f"{key}.new")
            notes = {STACK_FILE: marker}
            write_model(new, (), parts.like, notes, config=parts.config(), layout={})
            _check_whole(stack, Checkpoint(new))
            new.rename(place)
    return place


def _check_whole(stack: Stack, found: Checkpoint) -> None:
    """Raise `MergetuneError` where a layer is of another kind than its new place has."""
    lacking = [] if found.architecture is None else found.architecture.lacking(found.names)
    if lacking := [name for name in lacking if not (found.is_tied and is_head(name))]:
        raise MergetuneError(
            f"The stack {stack} cannot be made: in this architecture layers differ by their place, and those "
            f"that are moved lack {shortened(lacking)}. Move them to places of their own kind."
        )


@dataclass(frozen=True)
class _Model:
    """A model of a stack, with its settings as transformers reads them."""

    checkpoint: Checkpoint
    settings: Mapping[str, Any]

    @cached_property
    def depth_key(self) -> str | None:
        """The setting that says how many layers it has; None in a model of images and text."""
        is_text = "text_config" not in self.settings
        return next((key for key in DEPTH_KEYS if is_text and key in self.settings), None)

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return int(self.settings[self.depth_key or ""])

    @cached_property
    def lists(self) -> dict[str, Sequence[Any]]:
        """The settings that have an entry for each layer."""
        return {
            key: value
            for key, value in self.settings.items()
            if isinstance(value, list | tuple) and len(value) == self.depth and not _NO_LAYERS.search(key)
        }

    @cached_property
    def names(self) -> dict[int | None, list[str]]:
        """Its tensors by layer; None: outside the layers."""
        found: dict[int | None, list[str]] = {}
        for name in self.checkpoint.names:
            found.setdefault(tensor_place(name).layer, []).append(name)
        return found

    @property
    def n_rows(self) -> int | None:
        """The rows of its embeddings."""
        name = next(filter(is_embeddings, self.checkpoint.names), None)
        return None if name is None else self.checkpoint.shape(name)[0]


class _Parts:
    """The models of a stack, opened, and what the stack takes from each."""

    def __init__(self, stack: Stack, models: Mapping[str, Path]) -> None:
        self.stack = stack
        for name, folder in models.items():
            if is_adapter(folder):
                raise MergetuneError(
                    f"The stack {stack} cannot be made: {name} is an adapter, and a stack takes layers of "
                    "full models. Write a model of it first: `mergetune merge` with a recipe that has it."
                )
        self.models = {
            name: _Model(Checkpoint(folder), read_config(folder).to_dict()) for name, folder in models.items()
        }

    @property
    def like(self) -> Checkpoint:
        """The model whose tokenizer and configuration the stack has."""
        return self.models[self.stack.roles["tokenizer"]].checkpoint

    def problems(self) -> Iterator[str]:
        """Say why the stack cannot be made."""
        like = self.models[self.stack.roles["tokenizer"]]
        for name, model in self.models.items():
            if model.depth_key is None or like.depth_key is None:
                yield f"{name}: is no model of text alone. Stack models of text."
                return
            yield from _misfits(name, model, like, self.stack.roles["tokenizer"])
        for slot in self.stack.stack:
            if slot.layers[1] > (depth := self.models[slot.model].depth):
                yield f"{slot}: {slot.model} has the layers [0, {depth}]. Name layers among them."
        ends = [self.models[self.stack.roles[role]] for role in ("embeddings", "head")]
        if len({end.checkpoint.is_tied for end in ends}) > 1:
            yield (
                "the models of embeddings and head must both have a head of their own, or neither: "
                f"{' and '.join(self.stack.roles[role] for role in ('embeddings', 'head'))} differ. Name "
                "one model for both (`embeddings`, `head`)."
            )

    def config(self) -> dict[str, Any]:
        """Return the settings that differ from those of `like`: depth, and what is listed by layer."""
        like = self.models[self.stack.roles["tokenizer"]]
        config: dict[str, Any] = {like.depth_key or "": sum(map(len, self.stack.stack))}
        for key in like.lists:
            slots = ((self.models[slot.model].lists[key], slot.layers) for slot in self.stack.stack)
            config[key] = [each for values, (first, end) in slots for each in values[first:end]]
        tied = self.models[self.stack.roles["embeddings"]].checkpoint.is_tied
        return config | {"tie_word_embeddings": tied}

    def marker(self) -> dict[str, Any]:
        """Return where every tensor is: the models' directories, and one's number with its name there."""
        numbers = {name: number for number, name in enumerate(self.models)}
        return {
            "reference": self.stack.model_dump(mode="json", exclude_none=True),
            "folders": [str(model.checkpoint.folder) for model in self.models.values()],
            "tensors": {name: [numbers[model], own] for name, model, own in self._tensors()},
        }

    def _tensors(self) -> Iterator[tuple[str, str, str]]:
        """Yield each tensor of the stack: its name, and the model with its name there."""
        embeddings, head = self.stack.roles["embeddings"], self.stack.roles["head"]
        outside = [name for name in self.models[embeddings].names.get(None, ()) if _stands_before(name)]
        yield from ((name, embeddings, name) for name in outside)
        slots = ((slot.model, layer) for slot in self.stack.stack for layer in range(*slot.layers))
        for place, (model, layer) in enumerate(slots):
            for name in self.models[model].names[layer]:
                yield _LAYER.sub(rf"\g<1>{place}.", name, count=1), model, name
        outside = [name for name in self.models[head].names.get(None, ()) if not _stands_before(name)]
        yield from ((name, head, name) for name in outside)


def _stands_before(name: str) -> bool:
    """Say whether a tensor outside the layers stands before them: embeddings, and norms of these."""
    role = tensor_place(name).role
    return role == "embeddings" or (role != "head" and "embed" in name)


def _misfits(name: str, model: _Model, like: _Model, like_name: str) -> Iterator[str]:
    """Say what of a model does not fit the one that the stack has its configuration from."""
    ours, theirs = like.checkpoint.folder, model.checkpoint.folder
    for key, (our, their) in differing_settings(ours, theirs).items():
        if key not in DEPTH_KEYS and not (key in like.lists and key in model.lists):
            yield f"{name}: `{key}` is {their}, but {our} in {like_name}. Stack models of one architecture."
    vocabularies = [read_vocabulary(folder) for folder in (ours, theirs)]
    if (None not in vocabularies and vocabularies[0] != vocabularies[1]) or model.n_rows != like.n_rows:
        yield (
            f"{name}: its vocabulary is another one than that of {like_name}. Stack models with the same "
            "tokens, and as many rows of embeddings."
        )
