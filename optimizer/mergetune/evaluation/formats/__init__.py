"""Forms that items come in, told by the keys of their rows: adding one is its file and its place here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.formats.alpaca import ALPACA
from mergetune.evaluation.formats.bfcl import BFCL
from mergetune.evaluation.formats.chat import CHAT, CHAT_PROMPTS, SHARE_GPT
from mergetune.evaluation.formats.form import COMMON, Form, Row, has
from mergetune.evaluation.formats.pairs import COMPLETION, PREFERENCE
from mergetune.evaluation.formats.plain import BARE, PLAIN
from mergetune.evaluation.formats.samples import INSPECT, OPENAI_EVALS
from mergetune.evaluation.formats.tools import tools_of
from mergetune.evaluation.items import Message

__all__ = [
    "BFCL",
    "COMMON",
    "FORMS",
    "Form",
    "fields_of",
    "form_of",
    "form_rows",
    "suggestion",
]

# In the order in which they are tried.
FORMS = (
    *(PLAIN, BFCL, PREFERENCE, COMPLETION, CHAT, SHARE_GPT),
    *(CHAT_PROMPTS, BARE, ALPACA, OPENAI_EVALS, INSPECT),
)
_FIRST_ROWS = 20
_LIKE_PROMPT = ("question", "instruction", "input", "query", "problem", "text", "user")
_LIKE_ANSWER = (
    *("answer", "completion", "response", "output", "target", "ideal", "label", "solution", "ground_truth"),
)


def form_of(rows: Sequence[Row]) -> Form:
    """Return the form of a file: the first that one of its first rows is like.

    Raises:
        MergetuneError: they are like none; the message names the first row's keys and how to map them.
    """
    first = rows[:_FIRST_ROWS]
    found = next((form for form in FORMS if any(map(form.is_like, first))), None)
    if found is None:
        raise MergetuneError(_unknown(first[0]))
    return found


def fields_of(form: Form, row: Row) -> dict[str, Any]:
    """Return the fields of a row's item, `metadata` among them.

    Raises:
        MergetuneError: the row is broken; the message names the path of what is wrong.
    """
    _check_form(form, row)
    own = form.fields(row)
    beside = {key: row[key] for key in ("system", "answer", "choices", "patterns") if has(row, key)}
    if beside.get("system") and own.pop("system", "") not in ("", beside["system"]):
        raise MergetuneError(
            "`system`: must not differ from the conversation's own system message. Keep one."
        )
    fields = {**beside, **own}
    if tools := tools_of(row):
        fields.setdefault("tools", tools)
    if "target" in fields:
        fields["target"] = Message.model_validate(fields["target"])
        fields.setdefault("answer", fields["target"].wanted)
    return {**fields, "metadata": _metadata(row, {*form.keys, *COMMON})}


def suggestion(row: Row, *, has_prompt: bool = False) -> str:
    """Return the `fields` that a row's keys suggest."""
    prompt = next((key for key in _LIKE_PROMPT if key in row), "PATH")
    answer = next((key for key in _LIKE_ANSWER if key in row), "PATH")
    return f"`fields: {{{'' if has_prompt else f'prompt: {prompt}, '}answer: {answer}}}`"


def form_rows() -> list[tuple[str, str, str]]:
    """Return a row per form for the docs: its name, its keys, and what becomes of them."""
    return [(form.name, ", ".join(f"`{key}`" for key in form.keys), form.meaning) for form in FORMS]


def _check_form(form: Form, row: Row) -> None:
    if not any(each.is_like(row) for each in FORMS if each.keys == form.keys):
        there = "`, `".join(key for key in row if has(row, key))
        raise MergetuneError(
            f"must be as the first rows are, {form.name} (`{'`, `'.join(form.keys)}`), "
            f"but {f'has `{there}`' if there else 'is empty'}. A file has one form."
        )


def _unknown(row: Row) -> str:
    if not row:
        return "must be an item, such as a `prompt` with its `answer`, but is empty."
    return (
        f"must be of a form that is read, but has `{'`, `'.join(row)}`. Say in the task where an item's "
        f"fields stand, such as {suggestion(row)}; paths have dots, such as `gold.text`."
    )


def _metadata(row: Row, used: Collection[str]) -> dict[str, Any]:
    """Return all else of a row; the keys of an object `metadata` stand beside them."""
    rest = {key: value for key, value in row.items() if key not in used and value is not None}
    within = rest.get("metadata")
    if isinstance(within, dict):
        rest = {**within, **{key: value for key, value in rest.items() if key != "metadata"}}
    return rest
