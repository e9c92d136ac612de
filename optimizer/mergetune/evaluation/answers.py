"""Answers of JSONL items: what each scorer takes them for, or why it cannot take them.

An answer has one text, that of the reply which is wanted: replies are compared with it, and examples,
references and reports show it.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

ScorerKind = Literal["exact", "contains", "regex", "json", "choice"]

NOT_JSON = object()


class Number(float):
    """A number that is no integer, with the text that it was written as."""

    def __init__(self, written: str) -> None:
        self.written = written

    @property
    def is_certain(self) -> bool:
        """Say whether there is one way to write it: `1.50` could be `1.5`, and `2.0` and `2e0` be `2`."""
        return repr(float(self)) == self.written and not self.is_integer()


def load_json(text: str) -> Any:
    """Read JSON; numbers that are no integers are read as `Number`.

    Raises:
        ValueError: it is no JSON, as are NaN and Infinity, or a number has more digits than Python reads.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, parse_float=Number, parse_constant=_refuse_constant)


def parse_json(reply: str) -> object:
    """Parse a reply that is one JSON value (a Markdown code fence around it is taken off)."""
    text = reply.strip()
    first, _, rest = text.partition("\n")
    if first.rstrip() in ("```", "```json") and rest.endswith("```"):
        text = rest.removesuffix("```")
    try:
        return load_json(text)
    except (ValueError, RecursionError):
        return NOT_JSON


def answer_texts(kind: ScorerKind, answer: Any) -> list[str]:
    """Return an answer's texts: one, or those of a list of which `exact` takes any and `contains` all."""
    is_several = isinstance(answer, list) and kind in ("exact", "contains")
    return [_text(each) for each in (answer if is_several else [answer])]


def answer_text(kind: ScorerKind, answer: Any) -> str:
    """Return the reply that an answer asks for; of several that are right, the first."""
    texts = answer_texts(kind, answer)
    return ", ".join(texts) if kind == "contains" else texts[0]


def choice_index(choices: Sequence[str], answer: Any) -> int | None:
    """Return which choice an answer names, by its index from 0, its text or its letter; None: none."""
    if isinstance(answer, str):
        text, texts = answer.strip(), [choice.strip() for choice in choices]
        index = texts.index(text) if text in texts else _letter(text)
    elif isinstance(answer, bool) or not isinstance(answer, (int, float)) or answer != int(answer):
        return None
    else:
        index = int(answer)
    return index if index in range(len(choices)) else None


def answer_problem(kind: ScorerKind, answer: Any) -> str | None:
    """Say why a scorer of replies cannot take an answer; None where it can.

    An answer that no reply can have is one, and so is one that every reply has.
    """
    if kind == "json":
        return _json_problem(answer)
    if kind in ("exact", "contains"):
        parts = answer if isinstance(answer, list) else [answer]
        problem = next(filter(None, (_text_problem(kind, part) for part in parts)), None)
        return problem if parts else "`answer` must not be empty, but is []."
    return None


def choice_problem(choices: Sequence[str], answer: Any) -> str | None:
    """Say why `choice` cannot take an item; None where it can."""
    texts = [choice.strip() for choice in choices]
    if len(texts) < 2 or "" in texts or len(set(texts)) < len(texts):
        return (
            "the scorer `choice` needs two `choices` or more, each with a text of its own, "
            f"but got {_shown(list(choices))}."
        )
    if choice_index(choices, answer) is None:
        return (
            "the scorer `choice` needs `answer`, the right choice by its index from 0, its text or its "
            f"letter, but got {_shown(answer)} for {len(choices)} choices."
        )
    return None


def stop_problem(kind: ScorerKind, answer: Any, stop: Sequence[str], ignore_case: bool) -> str | None:
    """Say which stop string cuts off every reply that has the answer; None where none does."""
    if kind == "json":  # as it is written without any space
        texts = [json.dumps(parse_json(_text(answer)), ensure_ascii=False, separators=(",", ":"))]
    else:
        texts = answer_texts(kind, answer)
    for end in stop:
        if ignore_case and end.lower() != end.upper():
            continue  # the reply may be in the other case
        if held := next((text for text in texts if end in text), None):
            return (
                f"`answer` holds the stop string {end!r}, where every reply ends, so that no reply can be "
                f"right: it is {_shown(held)}. Change the task's `stop`, or the answer."
            )
    return None


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text_problem(kind: ScorerKind, part: Any) -> str | None:
    if part is None or isinstance(part, (dict, list)):
        which = "any of which is right" if kind == "exact" else "all of which must stand in the reply"
        return (
            f"`answer` must be text, a number, true or false, or a list of these, {which}, "
            f"but holds {_shown(part)}. The scorer for JSON is `json`."
        )
    if isinstance(part, Number) and not part.is_certain:
        return (
            f"`answer` is compared as text, and the number {part.written} can be written in other ways. "
            f'Put the text of the reply in quotes, such as "{part.written}".'
        )
    if kind == "contains" and not _text(part):
        return f"`answer` must not be empty, for every reply contains that, but is {_shown(part)}."
    return None


def _json_problem(answer: Any) -> str | None:
    if parse_json(_text(answer)) is not NOT_JSON:
        return None
    return (
        f"`answer` must be a JSON value, or JSON as text, but no JSON is {_shown(answer)}. "
        r'A text that is wanted in JSON has quotes of its own: "\"Paris\"". The scorers for plain text are '
        "`exact` and `contains`."
    )


def _letter(text: str) -> int:
    return string.ascii_uppercase.find(text) if len(text) == 1 else -1


def _shown(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
