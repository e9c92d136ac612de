"""Plain items: a prompt and an answer."""

from __future__ import annotations

from typing import Any

from mergetune.evaluation.formats.form import Form, Row, has, refuse


def _fields(row: Row) -> dict[str, Any]:
    if isinstance(row["prompt"], list):
        refuse("prompt", "must be text, as in the first rows", row["prompt"])
    return {"prompt": row["prompt"]}


def _has_an_end(row: Row) -> bool:
    """Say whether a row needs nothing beside its prompt, so that other keys are no part of its form."""
    is_text = isinstance(row.get("prompt"), str)
    return is_text and any(has(row, key) for key in ("answer", "choices", "patterns"))


PLAIN = Form(
    "prompts with answers",
    ("prompt",),
    "an item as it is",
    _has_an_end,
    _fields,
)
BARE = Form("prompts", ("prompt",), "an item without an answer", lambda row: has(row, "prompt"), _fields)
