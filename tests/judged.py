"""A judge that has no verdict on certain items, and a suite that it judges."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

Body = dict[str, Any]


def data_of(body: Body) -> Body:
    """Return the data of a question, as who takes the prompt's form at its word reads them."""
    begin, data, end = body["messages"][1]["content"].split("\n")
    assert begin == end
    assert begin in body["messages"][0]["content"]
    found: Body = json.loads(data)
    return found


def says(**verdict: Any) -> tuple[int, Body]:
    return 200, {"choices": [{"message": {"content": json.dumps({"reason": "So.", **verdict})}}]}


def prompt_of(body: Body) -> str:
    return str(data_of(body)["conversation"][-1]["content"])


def silent_on(*prompts: str, seen: list[str] | None = None) -> Callable[[Body], tuple[int, Body]]:
    """Grade replies by a hash of their text, but talk nonsense of the items with these prompts."""

    def answer(body: Body) -> tuple[int, Body]:
        prompt, data = prompt_of(body), data_of(body)
        if seen is not None:
            seen.append(prompt)
        if prompt in prompts:
            return 200, {"choices": [{"message": {"content": "Five stars!"}}]}
        return says(score=1 + zlib.crc32(f"{prompt} {data['reply']}".encode()) % 5)

    return answer


def question(number: int) -> str:
    return f"Question {number}?"


def write_judged_suite(
    folder: Path, url: str, n_items: int, judge: Mapping[str, Any] = MappingProxyType({}), **suite: Any
) -> Path:
    """Write a suite with one objective, `tone`, whose items ask `question(0)` and so on."""
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"prompt": question(number)}) for number in range(n_items)]
    (folder / "items.jsonl").write_text("\n".join(rows))
    (folder / "rubric.md").write_text("Score how friendly the reply is.")
    scorer = {"kind": "judge", "model": "plain", "url": url, "rubric": "rubric.md", **judge}
    task = {"items": "items.jsonl", "scorer": scorer, "max_new_tokens": 4}
    data = {
        "description": "test",
        "chat_template": True,
        "holdout": 0,
        "objectives": {"tone": {"tasks": [task]}},
        **suite,
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(data))
    return folder / "suite.yaml"
