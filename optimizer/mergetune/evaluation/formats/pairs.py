"""Prompts with completions, and with a preferred and a rejected reply, as TRL writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.formats.form import Form, Row, has, refuse, text_at
from mergetune.evaluation.formats.messages import Message, conversation, history, read_messages

_PROMPTS = ("prompt", "messages", "conversations")  # where a preference's prompt may stand


def _completion(row: Row) -> dict[str, Any]:
    if row.get("label") is False:
        raise MergetuneError(
            "`label`: must not be false, for then `completion` is not wanted. Leave such rows out."
        )
    if not isinstance(row.get("completion"), list):
        return {"prompt": text_at(row, "prompt"), "answer": text_at(row, "completion")}
    replies = read_messages(row["completion"], "completion")
    if not replies or replies[-1]["role"] != "assistant":
        refuse("completion", "must end with a message of the assistant", row["completion"])
    return conversation([*_asked(row, "prompt"), *replies], "prompt")


def _preference(row: Row) -> dict[str, Any]:
    key = next((key for key in _PROMPTS if has(row, key)), None)
    if not any(isinstance(row[each], (dict, list)) for each in ("chosen", "rejected")):
        is_text = key is None or (key == "prompt" and not isinstance(row[key], list))
        asked = {"prompt": row.get("prompt", "")} if is_text else history(_asked(row, str(key)), str(key))
        return _chosen(asked, text_at(row, "chosen"), text_at(row, "rejected"))
    chosen, rejected = (_replies(row, each) for each in ("chosen", "rejected"))
    if len(chosen) == len(rejected) == 1 and key is not None:
        asked = history(_asked(row, key), key)
    else:  # whole conversations, which begin alike
        n_common = _n_common(chosen, rejected)
        asked = history(chosen[:n_common], "chosen")
        chosen, rejected = chosen[n_common:], rejected[n_common:]
    return _chosen(asked, _one_reply(chosen, "chosen"), _one_reply(rejected, "rejected"))


def _asked(row: Row, key: str) -> list[Message]:
    """Return the messages of a prompt; text is one of the user."""
    if key == "prompt" and not isinstance(row.get(key), list):
        return [{"role": "user", "content": text_at(row, key)}]
    return read_messages(row[key], key)


def _replies(row: Row, key: str) -> list[Message]:
    value = row.get(key)
    return read_messages([value] if isinstance(value, dict) else value, key)


def _n_common(first: Sequence[Message], second: Sequence[Message]) -> int:
    pairs = zip(first, second, strict=False)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _one_reply(messages: Sequence[Message], key: str) -> str:
    if [message["role"] for message in messages] != ["assistant"] or "tool_calls" in messages[0]:
        raise MergetuneError(
            f"`{key}`: must differ from the other by one message of the assistant at its end, in text, but "
            f"there are: {', '.join(message['role'] for message in messages) or 'none'}."
        )
    content: str = messages[0]["content"]
    return content


def _chosen(asked: dict[str, Any], chosen: str, rejected: str) -> dict[str, Any]:
    return {**asked, "choices": [chosen, rejected], "answer": 0}


COMPLETION = Form(
    "prompts with completions",
    ("prompt", "completion"),
    "the completion is the answer; both may be messages",
    lambda row: has(row, "prompt", "completion"),
    _completion,
    is_conversation=True,
)
PREFERENCE = Form(
    "preferences",
    ("prompt", "chosen", "rejected"),
    "`chosen` and `rejected` are the choices, the first of which is right: for the scorer `choice`; as "
    "messages they may be whole conversations that begin alike, and without a `prompt` whole texts",
    lambda row: has(row, "chosen", "rejected"),
    _preference,
    is_conversation=True,
)
