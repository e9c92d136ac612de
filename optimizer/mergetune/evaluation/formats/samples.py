"""Samples of Inspect and of OpenAI's evals."""

from __future__ import annotations

from typing import Any

from mergetune.evaluation.formats.form import Form, Row, has, refuse, text_at
from mergetune.evaluation.formats.messages import history, read_messages


def _fields(row: Row, answer: str) -> dict[str, Any]:
    asked = row.get("input")
    if isinstance(asked, list):
        return {**history(read_messages(asked, "input"), "input"), "answer": row.get(answer)}
    if not text_at(row, "input"):
        refuse("input", "must be text that is not empty, or messages", asked)
    return {"prompt": asked, "answer": row.get(answer)}


INSPECT = Form(
    "samples of Inspect",
    ("input", "target"),
    "`input`, text or messages, is asked, and `target` is the answer, or a list of answers",
    lambda row: has(row, "input", "target"),
    lambda row: _fields(row, "target"),
    is_conversation=True,
)
OPENAI_EVALS = Form(
    "samples of OpenAI's evals",
    ("input", "ideal"),
    "`input`, text or messages, is asked, and `ideal` is the answer, or a list of answers",
    lambda row: has(row, "input", "ideal"),
    lambda row: _fields(row, "ideal"),
    is_conversation=True,
)
