"""What the tokenizer files of a model or adapter directory say, without loading a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimizer.merging.tensor_files import read_json

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Say whether the directory holds a vocabulary."""
    return any((folder / name).exists() for name in VOCABULARY_FILES)


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token → id, added tokens included; None if only a SentencePiece model holds them."""
    if (folder / "tokenizer.json").exists():
        tokenizer = read_json(folder / "tokenizer.json")
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        return _pieces(tokenizer["model"]["vocab"]) | added
    if (folder / "vocab.json").exists():
        return read_json(folder / "vocab.json") | _added_tokens(folder)
    if (folder / "vocab.txt").exists():
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return {token: number for number, token in enumerate(tokens)} | _added_tokens(folder)
    return None


def read_chat_template(folder: Path) -> object:
    """Return the chat template (a list of them if they are named), or None."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read_if_there(folder / name).get("chat_template")
        if template:
            return template
    return None


def read_pipeline(folder: Path) -> dict[str, Any]:
    """Return the steps of `tokenizer.json` that, beside the vocabulary, turn text into tokens."""
    tokenizer = _read_if_there(folder / "tokenizer.json")
    merges = [
        merge.split(" ") if isinstance(merge, str) else merge  # the older and the newer notation
        for merge in (tokenizer.get("model") or {}).get("merges") or []
    ]
    steps = ("normalizer", "pre_tokenizer")
    return {"merges": merges} | {step: tokenizer.get(step) for step in steps}


def _pieces(vocabulary: dict[str, int] | list[list[Any]]) -> dict[str, int]:
    """Return token → id; a Unigram model lists (piece, score) in the order of the ids."""
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    return {piece: number for number, (piece, _) in enumerate(vocabulary)}


def _added_tokens(folder: Path) -> dict[str, int]:
    decoder = _read_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    named = {token["content"]: int(number) for number, token in decoder.items()}
    return named | _read_if_there(folder / "added_tokens.json")


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
