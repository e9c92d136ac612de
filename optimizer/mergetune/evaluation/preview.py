"""Previews of items: each as the model will see it, and what its reply is scored against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from mergetune.engines.call_text import call_json
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.scorers import BaseScorer, Scorer
from mergetune.files.yaml_io import KindAlone, Strict, validate


class _Chosen(Strict):
    scorer: Annotated[Scorer, KindAlone]


def scorer_of(given: str | Mapping[str, Any]) -> BaseScorer:
    """Return a scorer by its kind, or as a suite says it; raises `MergetuneError` where there is none."""
    return validate({"scorer": given}, _Chosen, "The scorer").scorer


def preview(item: Item, scorer: BaseScorer | None = None, tokenizer: Any = None) -> str:
    """Return an item as text: what is asked, and what is wanted.

    Args:
        item: the item.
        scorer: says what it scores; None: the reply or the answer in the data is shown.
        tokenizer: from transformers, whose chat template writes what is asked, with its special tokens; None:
            the messages are shown by their roles.

    Raises:
        MergetuneError: the chat template does not take the conversation.
    """
    asked = _by_role(item) if tokenizer is None else _rendered(item, tokenizer)
    return f"{asked}\n--- what is wanted\n{_wanted(item, scorer)}"


def _by_role(item: Item) -> str:
    tools = [f"[tools] {', '.join(map(_signature, item.tools))}"] if item.tools else []
    return "\n".join([*tools, *(_line(message) for message in item.conversation)])


def _rendered(item: Item, tokenizer: Any) -> str:
    from mergetune.engines.conversations import render

    return render(tokenizer, [message.as_dict() for message in item.conversation], tools=item.tools)


def _signature(tool: dict[str, Any]) -> str:
    function = tool["function"]
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties")
    return f"{function['name']}({', '.join(properties if isinstance(properties, dict) else ())})"


def _line(message: Message) -> str:
    """Return a message as its role and what it says, with its calls in JSON."""
    calls = [call_json(call.name, call.arguments) for call in message.tool_calls]
    said = [message.content] if message.content or not calls else []
    return f"[{message.role}] {' '.join([*said, *calls])}"


def _wanted(item: Item, scorer: BaseScorer | None) -> str:
    if scorer is not None:
        return scorer.target_text(item)
    named = {"choices": list(item.choices), "patterns": list(item.patterns)}
    lines = [f"{name}: {json.dumps(own, ensure_ascii=False)}" for name, own in named.items() if own]
    if item.target is not None and item.answer == item.target.wanted:
        return _line(item.target)
    if item.answer is not None:
        lines.append(
            item.answer if isinstance(item.answer, str) else json.dumps(item.answer, ensure_ascii=False)
        )
    return "\n".join(lines) or "nothing: there is no answer"
