"""Conversations as a model's chat template writes them: whole, or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError

from mergetune.errors import MergetuneError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

# Special tokens that say something: where thoughts and calls of tools begin and end. All others are left out.
MARKERS = frozenset(
    {
        *("<think>", "</think>", "[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>"),
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|tool_call|>"),
        *("<|START_ACTION|>", "<|END_ACTION|>", "<|channel|>", "<|message|>", "<|constrain|>"),
    }
)
_END_OF_THOUGHT = "</think>"  # templates leave out what earlier replies have before it
_REFUSALS = (TemplateError, ValueError, TypeError, KeyError)  # the template's own words, and transformers'
_WITHOUT_SYSTEM = (
    "Say `system: merge_into_user` in the suite, which writes it before the first user message, or leave "
    "`system` out."
)
_ANOTHER = "Name another chat template in the suite (`chat_template: FILE.jinja`, relative to the suite)"
_OTHERWISE = f"{_ANOTHER}; plain prompts can be asked without one (`chat_template: false`)."


def render(
    tokenizer: Any,
    messages: Messages,
    add_generation_prompt: bool = True,
    tools: Tools = (),
    arguments: Mapping[str, Any] = MappingProxyType({}),
    *,
    is_whole: bool = False,
) -> str:
    """Return a conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: from transformers.
        messages: each with `role` and `content`, and `tool_calls` where it calls tools.
        add_generation_prompt: begin the model's reply; else the last message is left open.
        tools: JSON Schemas of the tools that the model may call.
        arguments: further variables of the template, such as `enable_thinking`.
        is_whole: end the last message, too, and begin no reply.

    Raises:
        MergetuneError: there is no template, it refuses the conversation, knows nothing of an argument, or
            leaves out a message, a call or a tool.
    """
    if not tokenizer.chat_template:
        raise MergetuneError(
            f"{tokenizer.name_or_path}: conversations need a chat template, but the tokenizer has none. "
            f"{_OTHERWISE}"
        )
    _check_arguments(tokenizer, arguments)
    begins = add_generation_prompt and not is_whole
    given = {
        "tools": [dict(tool) for tool in tools] or None,
        "add_generation_prompt": begins,
        "continue_final_message": not begins and not is_whole,
        **arguments,
    }
    try:
        text = _rendered(tokenizer, messages, given)
    except _REFUSALS as error:
        what, remedy = _refused(tokenizer, messages, given)
        raise MergetuneError(
            f"{tokenizer.name_or_path}: the chat template must take the suite's conversations, but refuses "
            f"{what} ({error}). {remedy}"
        ) from error
    for message in messages:
        if (part := left_out(text, message)) is not None:
            role = message["role"]
            raise MergetuneError(
                f"{tokenizer.name_or_path}: the chat template must write every message, but leaves out "
                f"one of the role `{role}`: {part!r:.200}. "
                f"{_WITHOUT_SYSTEM if role == 'system' else _OTHERWISE}"
            )
    if (name := unwritten_tool(tools, text)) is not None:
        raise MergetuneError(
            f"{tokenizer.name_or_path}: the chat template must write every tool, but leaves out `{name}`: it "
            f"was made for a model that calls none. {_ANOTHER}."
        )
    return text


def unwritten_tool(tools: Tools, text: str) -> str | None:
    """Return the name of the first tool that does not stand in a text with all of its parameters' names."""
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        names = [str(name) for name in (function.get("name"), *(properties or ()))]
        if any(name not in text and json.dumps(name)[1:-1] not in text for name in names):
            return names[0]
    return None


def left_out(text: str, message: Mapping[str, Any]) -> str | None:
    """Return a part of a message that a chat template's text lacks, plain and in JSON; None: all is there."""
    parts = _parts(message)
    lacking = (part for part in parts if part not in text and json.dumps(part)[1:-1] not in text)
    return next(lacking, None)


def _parts(message: Mapping[str, Any]) -> list[str]:
    """Return what must stand in the text of a message: what it says, and the names of the tools it calls."""
    said = str(message.get("content") or "").rpartition(_END_OF_THOUGHT)[2].strip()
    return [said, *(call["function"]["name"] for call in message.get("tool_calls", ()))]


def _check_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `MergetuneError` where a template has no variable of an argument's name."""
    text = str(tokenizer.chat_template)
    if unknown := [name for name in arguments if not re.search(rf"\b{re.escape(name)}\b", text)]:
        raise MergetuneError(
            f"{tokenizer.name_or_path}: `template_arguments` must name variables of the chat template, but "
            f"it has no `{'`, `'.join(unknown)}`. Correct the name, or leave it out."
        )


def _rendered(tokenizer: Any, messages: Messages, given: Mapping[str, Any]) -> str:
    own = [dict(message) for message in messages]
    text: str = tokenizer.apply_chat_template(own, tokenize=False, **given)
    return text


def _refused(tokenizer: Any, messages: Messages, given: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a template refused, the system message if it takes the rest, and what to do about it."""
    roles = [message["role"] for message in messages]
    others = [message for message in messages if message["role"] != "system"]
    if "system" in roles and others:
        try:
            _rendered(tokenizer, others, given)
        except _REFUSALS:
            pass
        else:
            return "a system message", _WITHOUT_SYSTEM
    return f"messages of the roles {', '.join(roles)}", _OTHERWISE
