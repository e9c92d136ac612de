"""What the tokenizer files of a model or adapter directory say, without loading a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mergetune.weights.tensor_files import read_json

VocabularyRule = Literal["refuse", "base", "mean"]  # what becomes of tokens that experts added
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
VOCABULARY_REMEDY = (
    "If it only adds tokens, set `vocabulary: base` or `vocabulary: mean` in the study file, or --vocabulary."
)


def has_tokenizer(folder: Path) -> bool:
    """Say whether the directory holds a vocabulary."""
    return any((folder / name).exists() for name in VOCABULARY_FILES)


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token → id, added tokens included; None if only a SentencePiece model holds them."""
    pieces: dict[str, int]
    if (folder / "tokenizer.json").exists():
        pieces = _pieces(read_json(folder / "tokenizer.json")["model"]["vocab"])
    elif (folder / "vocab.json").exists():
        pieces = read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").exists():
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        pieces = {token: number for number, token in enumerate(tokens)}
    else:
        return None
    return pieces | {token: entry["id"] for token, entry in read_added_tokens(folder).items()}


def read_added_tokens(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the tokens that stand beside the pieces of text, each with its id and how it is matched.

    The keys are those of `tokenizer.json`: id, single_word, lstrip, rstrip, normalized, special.
    """
    if (folder / "tokenizer.json").exists():
        entries = read_json(folder / "tokenizer.json").get("added_tokens") or []
        return {entry["content"]: entry for entry in entries}
    decoder = _read_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found = {entry["content"]: {**entry, "id": int(number)} for number, entry in decoder.items()}
    listed = _read_if_there(folder / "added_tokens.json")
    return found | {token: {**found.get(token, {}), "id": number} for token, number in listed.items()}


def read_chat_template(folder: Path) -> object:
    """Return the chat template (a list of them if they are named), or None."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read_if_there(folder / name).get("chat_template")
        if template:
            return template
    return None


def read_special_token(folder: Path, key: str) -> str | None:
    """Return a special token such as `eos_token`, or None."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_if_there(folder / name).get(key)
        if token:
            return str(token["content"] if isinstance(token, dict) else token)
    return None


def read_eos_ids(folder: Path) -> list[int]:
    """Return the tokens that end a text by generation_config.json or, where it names none, config.json."""
    config = _read_if_there(folder / "config.json")
    for source in (_read_if_there(folder / "generation_config.json"), config, config.get("text_config")):
        found = source.get("eos_token_id") if isinstance(source, dict) else None
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []


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


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
