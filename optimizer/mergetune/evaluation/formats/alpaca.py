"""Instructions with outputs, as Alpaca's data and LLaMA-Factory write them."""

from __future__ import annotations

from typing import Any

from mergetune.evaluation.formats.form import Form, Row, has, list_at, refuse, text_at
from mergetune.evaluation.formats.messages import Message, history


def _fields(row: Row) -> dict[str, Any]:
    asked = "\n".join(
        filter(None, (text_at(row, "instruction"), text_at(row, "input") if has(row, "input") else ""))
    )
    fields: dict[str, Any] = {"prompt": asked}
    reply = text_at(row, "output") if has(row, "output") else None
    if has(row, "history") and (before := _turns(row["history"])):
        fields = history([*before, {"role": "user", "content": asked}], "history")
        if reply:
            fields["target"] = {"role": "assistant", "content": reply}
    return fields if reply is None else {**fields, "answer": reply}


def _turns(value: Any) -> list[Message]:
    """Return the messages of earlier turns, each a pair of what was asked and replied."""
    messages: list[Message] = []
    for index, pair in enumerate(list_at(value, "history")):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            refuse(f"history.{index}", "must be two texts, what was asked and what was replied", pair)
        messages += [
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return messages


ALPACA = Form(
    "Alpaca",
    ("instruction", "input", "output", "history"),
    "`instruction`, with `input` on the next line, is the prompt, and `output` the answer; `history` has "
    "earlier turns in pairs",
    lambda row: has(row, "instruction"),
    _fields,
    is_conversation=True,
)
