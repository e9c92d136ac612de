"""Conversations as OpenAI and TRL write them, as ShareGPT does, and prompts that are messages."""

from __future__ import annotations

from typing import Any

from mergetune.evaluation.formats.form import Form, Row, has, refuse
from mergetune.evaluation.formats.messages import conversation, history, read_messages


def _conversation(row: Row, key: str) -> dict[str, Any]:
    return conversation(read_messages(row.get(key), key), key)


def _prompts(row: Row) -> dict[str, Any]:
    if not isinstance(row["prompt"], list):
        refuse("prompt", "must be messages, as in the first rows", row["prompt"])
    return history(read_messages(row["prompt"], "prompt"), "prompt")


CHAT = Form(
    "OpenAI chat",
    ("messages",),
    "the last message of the assistant is the reply that is wanted, and what stands before it is asked",
    lambda row: has(row, "messages"),
    lambda row: _conversation(row, "messages"),
    is_conversation=True,
)
SHARE_GPT = Form(
    "ShareGPT",
    ("conversations",),
    "as OpenAI chat; a `function_call` is JSON of one call or several, an `observation` a tool's result",
    lambda row: has(row, "conversations"),
    lambda row: _conversation(row, "conversations"),
    is_conversation=True,
)
CHAT_PROMPTS = Form(
    "prompts of messages",
    ("prompt",),
    "all of the messages are asked",
    lambda row: isinstance(row.get("prompt"), list),
    _prompts,
    is_conversation=True,
)
