"""Conversations as a model's chat template writes them: whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from mergetune.errors import MergetuneError

Messages = Sequence[Mapping[str, str]]

_END_OF_THOUGHT = "</think>"  # templates leave out what earlier replies have before it
_REFUSALS = (TemplateError, ValueError, TypeError)  # the template's own words, and transformers'
_WITHOUT_SYSTEM = (
    "Say `system: merge_into_user` in the suite, which writes it before the first user message, or leave "
    "`system` out."
)
_OTHERWISE = (
    "Name another chat template in the suite (`chat_template: FILE.jinja`, relative to the suite), or ask "
    "without conversations (`chat_template: false`)."
)


def render(tokenizer: Any, messages: Messages, add_generation_prompt: bool = True) -> str:
    """Return a conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: from transformers.
        messages: each with `role` and `content`.
        add_generation_prompt: begin the model's reply; else the last message is left open.

    Raises:
        MergetuneError: there is no template, it refuses the conversation, or it leaves a message out.
    """
    if not tokenizer.chat_template:
        raise MergetuneError(
            f"{tokenizer.name_or_path}: conversations need a chat template, but the tokenizer has none. "
            f"{_OTHERWISE}"
        )
    try:
        text = _rendered(tokenizer, messages, add_generation_prompt)
    except _REFUSALS as error:
        what, remedy = _refused(tokenizer, messages, add_generation_prompt)
        raise MergetuneError(
            f"{tokenizer.name_or_path}: the chat template must take the suite's conversations, but refuses "
            f"{what} ({error}). {remedy}"
        ) from error
    for message in messages:
        if message["content"].rpartition(_END_OF_THOUGHT)[2].strip() not in text:
            role = message["role"]
            raise MergetuneError(
                f"{tokenizer.name_or_path}: the chat template must write every message, but leaves out one "
                f"of the role `{role}`: {message['content']!r:.200}. "
                f"{_WITHOUT_SYSTEM if role == 'system' else _OTHERWISE}"
            )
    return text


def _rendered(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    return text


def _refused(tokenizer: Any, messages: Messages, add_generation_prompt: bool) -> tuple[str, str]:
    """Return what a template refused, the system message if it takes the rest, and what to do about it."""
    roles = [message["role"] for message in messages]
    others = [message for message in messages if message["role"] != "system"]
    if "system" in roles and others:
        try:
            _rendered(tokenizer, others, add_generation_prompt)
        except _REFUSALS:
            pass
        else:
            return "a system message", _WITHOUT_SYSTEM
    return f"messages of the roles {', '.join(roles)}", _OTHERWISE
