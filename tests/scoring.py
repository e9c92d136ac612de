"""Scorers and suites of a few items, as tests make them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers import BaseScorer, Scorer


def scorer_of(kind: str, **options: Any) -> BaseScorer:
    scorer: BaseScorer = TypeAdapter(Scorer).validate_python({"kind": kind, **options})
    return scorer


def score(scorer: BaseScorer, reply: str, answer: Any, **fields: Any) -> float:
    (found,) = scorer.score([Item(prompt="x", answer=answer, **fields)], [reply])
    return found


def write_suite(folder: Path, task: dict[str, Any], **suite: Any) -> Path:
    """Write a suite of one task, whose items are those of `items.jsonl` beside it."""
    tasks = [{"items": "items.jsonl", **task}]
    suite = {"description": "test", "chat_template": False, "holdout": 0, **suite}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**suite, "objectives": {"skill": {"tasks": tasks}}}))
    return path


def write_items(folder: Path, *items: dict[str, Any]) -> None:
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
