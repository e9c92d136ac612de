"""What an engine has to know of a model's files beside its weights: tokenizer, ends of replies, length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.weights.architecture import read_config
from mergetune.weights.chat_template import ChatTemplate, open_tokenizer
from mergetune.weights.tokenizer_files import read_eos_ids

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_ABSURD = 10**9  # tokens: tokenizers without a limit say 1e30
_DEFAULT_LENGTH = 2048  # as lm-eval and vLLM take where nothing is said


@dataclass(frozen=True)
class ModelText:
    """How a model reads and ends text, the same in every engine.

    Attributes:
        tokenizer: from transformers.
        end_tokens: each of them ends a reply: those of generation_config.json, the tokenizer's end of
            text, and what ends a message of the chat template that was put into it.
        max_length: the most tokens that prompt and reply may have together.
    """

    tokenizer: Any
    end_tokens: tuple[int, ...]
    max_length: int

    @classmethod
    def read(cls, folder: Path, max_length: int | None, chat: ChatTemplate | None = None) -> ModelText:
        """Read a model directory.

        Args:
            folder: the directory.
            max_length: what the user gave; None takes what the model was made for.
            chat: takes the place of the tokenizer's chat template.

        Raises:
            MergetuneError: the tokenizer cannot be opened or names no end of text, or the model has not so
                many positions.
        """
        tokenizer = open_tokenizer(folder)
        ends = [tokenizer.eos_token_id, *read_eos_ids(folder)]
        if chat is not None:
            chat.put_into(tokenizer)
            ends += tokenizer.convert_tokens_to_ids(list(chat.ends))
        if tokenizer.eos_token_id is None:
            raise MergetuneError(
                f"{folder}: the tokenizer must name the token that ends a text, but has no `eos_token`. Set "
                "it in tokenizer_config.json."
            )
        end_tokens = tuple(dict.fromkeys(each for each in ends if each is not None))
        return cls(tokenizer, end_tokens, _length(folder, tokenizer, max_length))


def sane_length(tokenizer: Any) -> int | None:
    """Return the greatest length that a tokenizer names, None where it names none."""
    named = getattr(tokenizer, "model_max_length", None)
    return int(named) if named is not None and 0 < named < _ABSURD else None


def _length(folder: Path, tokenizer: Any, given: int | None) -> int:
    """Return the length that was given, or else the smaller of what config and tokenizer name."""
    positions, scale = _positions(folder)
    if given is None:
        return min(filter(None, (positions, sane_length(tokenizer))), default=_DEFAULT_LENGTH)
    if positions is not None and given > positions * scale:
        raise MergetuneError(
            f"`engine.max_length` must be at most the positions that the model has, but is {given}, and "
            f"{folder / 'config.json'} has {int(positions * scale)}. Give less, or leave it out."
        )
    return given


def _positions(folder: Path) -> tuple[int | None, float]:
    """Return how many positions a model was made for, and the factor that they can be stretched by."""
    config = read_config(folder).get_text_config()
    found = (getattr(config, name, None) for name in _POSITIONS)
    positions = next((value for value in found if isinstance(value, int) and 0 < value < _ABSURD), None)
    rope = getattr(config, "rope_parameters", None) or {}
    scale = rope.get("factor") or 1.0
    if positions is not None and rope.get("rope_type") == "longrope":
        # beyond its first length such a model computes shorter texts otherwise, too
        first = getattr(config, "original_max_position_embeddings", None) or rope.get(
            "original_max_position_embeddings"
        )
        return (first, positions / first) if first else (positions, 1.0)
    return positions, scale if rope.get("rope_type") in ("linear", "dynamic") else 1.0
