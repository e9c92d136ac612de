"""Files of items: JSON lines or a JSON array. Files in another form are called what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import load_json
from mergetune.files.yaml_io import read_text

_ITEM = '{"prompt": "…", "answer": "…"}'
_TURN = (
    "Conversations are not read: an item is one turn, with the user's message as `prompt`, the system "
    "message as `system` and the reply that is wanted as `answer`."
)
# The keys that tell another form of data, its name, and what is to be done with it.
_FORMS = (
    ({"messages"}, "a conversation in OpenAI's form", _TURN),
    ({"conversations"}, "a conversation in ShareGPT's form", _TURN),
    (
        {"instruction", "output"},
        "an example in Alpaca's form",
        "Write `instruction`, with `input` after it, as `prompt`, and rename `output` to `answer`.",
    ),
    (
        {"question", "function"},
        "a test of the Berkeley Function-Calling Leaderboard",
        "Write the user's message as `prompt`, the functions as `system` and the call that is wanted as "
        "`answer`, as the model is to write it.",
    ),
    (
        {"input", "ideal"},
        "a sample of OpenAI's evals",
        "Write the user's message in `input` as `prompt`, and rename `ideal` to `answer`.",
    ),
    ({"input", "target"}, "a sample of Inspect", "Rename `input` to `prompt` and `target` to `answer`."),
)
_LIKE_PROMPT = ("question", "instruction", "input", "query", "problem", "text", "user")
LIKE_ANSWER = ("completion", "response", "output", "target", "ideal", "label", "solution", "chosen")


def read_objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the objects in a file, one a line or all in a JSON array, each with its place for errors.

    Raises:
        MergetuneError: the file cannot be read, or its form is another one; the message says which.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            values = load_json(text)
        except (ValueError, RecursionError) as error:
            raise MergetuneError(f"{path}: is no JSON array: {error}.") from error
        return [_object(value, f"{path}, item {number}") for number, value in enumerate(values, start=1)]
    return [
        _object(_value(line, f"{path}, line {number}", text), f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)  # strings may hold other separators
        if line.strip()
    ]


def refuse_without_prompt(data: dict[str, Any], place: str) -> None:
    """Raise `MergetuneError` where an object has no `prompt` that is text, and say what it has instead."""
    if isinstance(data.get("prompt"), list):
        raise MergetuneError(f"{place}: `prompt` must be text, but is a list. {_TURN}")
    if "prompt" in data:
        return
    if not data:
        raise MergetuneError(f"{place}: `prompt` is missing; the item is empty.")
    form = next((form for form in _FORMS if data.keys() >= form[0]), None)
    if form is not None:
        what = f", which is {form[1]}. {form[2]}"
    else:
        like = next((key for key in _LIKE_PROMPT if key in data), None)
        what = f". Rename `{like}` to `prompt`." if like else f". An item is an object such as {_ITEM}."
    raise MergetuneError(f"{place}: `prompt` is missing; the item has `{'`, `'.join(data)}`{what}")


def _object(value: Any, place: str) -> tuple[str, dict[str, Any]]:
    if isinstance(value, dict):
        return place, value
    shown = json.dumps(value, ensure_ascii=False)
    raise MergetuneError(f"{place}: must be one JSON object, such as {_ITEM}, but is {shown:.80}.")


def _value(line: str, place: str, text: str) -> Any:
    try:
        return load_json(line)
    except (ValueError, RecursionError) as error:
        raise MergetuneError(f"{place}: is not JSON: {error}.{_form_of(text)}") from error


def _form_of(text: str) -> str:
    """Say what a file may be that is no JSON lines."""
    if not text.lstrip().startswith("{"):
        return (
            f" A file of items has one JSON object a line, such as {_ITEM}, or is a JSON array of them. "
            "A table (CSV) is written so by pandas: "
            'read_csv("items.csv").to_json("items.jsonl", orient="records", lines=True).'
        )
    try:
        load_json(text)
    except (ValueError, RecursionError):
        return ""
    return " The file is one JSON object over several lines: write each item on one line, or all as an array."
