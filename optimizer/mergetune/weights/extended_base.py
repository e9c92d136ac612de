"""A base with the tokens that its experts added: a model directory of its own, written once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.errors import MergetuneError
from mergetune.weights.chat_template import open_tokenizer
from mergetune.weights.checkpoint import Checkpoint, Expert, has_token_rows
from mergetune.weights.models import model_name
from mergetune.weights.tensor_files import read_json, shortened
from mergetune.weights.tokenizer_files import (
    read_added_tokens,
    read_vocabulary,
)
from mergetune.weights.vocabulary import own_tensor, tokens_of
from mergetune.weights.writer import Layout, layout_of, write_model

# Stands in an extended base: what it was made of, and the row of every token that was added.
MARKER = "extended_vocabulary.json"
_ATTRIBUTES = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SAVED = (".json", ".jinja", ".txt")


def extend_base(base: Checkpoint, experts: Sequence[Expert], folder: Path) -> Checkpoint:
    """Return the base with the tokens that experts added, as a model directory written to `folder`.

    New tokens follow the base's in the order of the experts, and take spare rows of the embeddings
    first. The row of a new token is the mean over the experts that have it.

    A `folder` made of the same models is used as it is. Where nothing is added, that is `base`.

    Raises:
        MergetuneError: the folder holds something else, or the tokens cannot be added.
    """
    added = {expert.name: _new_tokens(base, expert) for expert in experts}
    parts = _Parts(base, experts, added)
    if not any(added.values()):
        return base
    origin = parts.origin
    if not folder.exists():
        _write(folder, parts, _extend_tokenizer(parts), origin)
    elif {key: _read_marker(folder).get(key) for key in origin} != origin:
        raise MergetuneError(
            f"{folder}: must hold the base with the tokens of these experts, but was made of other models. "
            "Give a new directory with --out."
        )
    return Checkpoint(folder)


def settled_tokens(base: Path) -> frozenset[str]:
    """Return the tokens of an extended base whose rows are their final ones."""
    return frozenset(_read_marker(base).get("rows", ()))


def _new_tokens(base: Checkpoint, expert: Expert) -> dict[str, int]:
    """Return the tokens that only the expert has, with its rows of them, in their order there."""
    ours, theirs = read_vocabulary(base.folder) or {}, tokens_of(expert, base) or {}
    return {token: theirs[token] for token in sorted(theirs, key=theirs.__getitem__) if token not in ours}


@dataclass(frozen=True)
class _Parts:
    """What an extended base is made of.

    `added` holds, by expert, the tokens that the base lacks and their rows in the expert.
    """

    base: Checkpoint
    experts: Sequence[Expert]
    added: Mapping[str, Mapping[str, int]]

    @property
    def origin(self) -> dict[str, Any]:
        """What tells whether a folder was made of the same, as JSON."""
        return {
            "base": self.base.digest,
            "experts": [[expert.name, expert.digest, self.added[expert.name]] for expert in self.experts],
        }

    def mean_rows(self, name: str, tokens: Sequence[str]) -> Tensor:
        """Return the mean row of every token over the experts that have it, (n_tokens, …), in float32."""
        places = {token: place for place, token in enumerate(tokens)}
        shape = self.base.shape(name)[1:]
        total, count = torch.zeros(len(tokens), *shape), torch.zeros(len(tokens), *(1 for _ in shape))
        for expert in self.experts:
            rows = self.added[expert.name]
            if rows:
                own = own_tensor(expert, name, self.base)
                there = [places[token] for token in rows]
                total[there] += own[list(rows.values())].float()
                count[there] += 1
        return total / count


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer with new tokens: its files, and the rows of those tokens."""

    files: dict[str, str]
    rows: dict[str, int]


def _extend_tokenizer(parts: _Parts) -> _Tokenizer:
    from transformers import AddedToken

    tokenizer = open_tokenizer(parts.base.folder)
    rows: dict[str, int] = {}
    for expert in parts.experts:
        known = read_added_tokens(expert.folder)
        for token in (token for token in parts.added[expert.name] if token not in rows):
            attributes = {key: known[token][key] for key in _ATTRIBUTES if key in known[token]}
            tokenizer.add_tokens(AddedToken(token, **attributes))
            rows[token] = tokenizer.convert_tokens_to_ids(token)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        paths = [path for path in Path(saved).iterdir() if path.suffix in _SAVED]
        files = {path.name: path.read_text(encoding="utf-8") for path in paths}
        _check_vocabulary(parts.base.folder, Path(saved), rows)
    return _Tokenizer(files, rows)


def _check_vocabulary(base: Path, saved: Path, rows: Mapping[str, int]) -> None:
    found = read_vocabulary(saved) or {}
    wanted = {**(read_vocabulary(base) or {}), **rows}
    differing = [repr(token) for token, row in wanted.items() if found.get(token) != row]
    if differing:
        raise MergetuneError(
            f"{base}: transformers saves its tokenizer with other numbers for {shortened(differing, 3)}. Use "
            "`vocabulary: base`, or give a base whose tokenizer was saved by `save_pretrained`."
        )


def _write(folder: Path, parts: _Parts, tokenizer: _Tokenizer, origin: Mapping[str, Any]) -> None:
    layout = _extend_layout(parts.base, tokenizer.rows)
    values = {"vocab_size": max(shape[0] for name, (_, shape) in layout.items() if has_token_rows(name))}
    notes = tokenizer.files | {MARKER: json.dumps({**origin, "rows": tokenizer.rows}, indent=1)}
    config = _changed_config(parts.base.config, values)
    config["_name_or_path"] = model_name(parts.base.folder, parts.base.config)
    tensors = _extend_tensors(parts, tokenizer.rows, layout)
    write_model(folder, tensors, parts.base, notes, config=config, layout=layout)


def _extend_layout(base: Checkpoint, rows: Mapping[str, int]) -> Layout:
    n_rows = 1 + max(rows.values(), default=-1)
    return {
        name: (dtype, (max(shape[0], n_rows), *shape[1:]) if has_token_rows(name) else shape)
        for name, (dtype, shape) in layout_of(base).items()
    }


def _changed_config(config: Mapping[str, Any], values: Mapping[str, int]) -> dict[str, Any]:
    """Return the keys of config.json that change; a multimodal model has a `text_config` in it."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return dict(values)
    outer = {key: value for key, value in values.items() if key in config}
    return outer | {"text_config": {**nested, **values}}


def _extend_tensors(parts: _Parts, rows: Mapping[str, int], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    for name in parts.base.names:
        tensor = parts.base.view(name)
        if has_token_rows(name) and rows:
            extended = torch.zeros(layout[name][1], dtype=tensor.dtype)
            extended[: len(tensor)] = tensor
            extended[list(rows.values())] = parts.mean_rows(name, list(rows)).to(tensor.dtype)
            tensor = extended
        yield name, tensor


def _read_marker(folder: Path) -> dict[str, Any]:
    return read_json(folder / MARKER) if (folder / MARKER).exists() else {}
