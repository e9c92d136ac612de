"""The scorer `json_schema`: replies are held against a schema beside the suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.scorers import BaseScorer
from mergetune.evaluation.suite import read_suite
from scoring import score, scorer_of, write_items, write_suite

TASK = {"scorer": {"kind": "json_schema", "schema_file": "call.schema.json"}}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"name": {"enum": ["weather"]}, "days": {"type": "integer", "minimum": 1}},
    "required": ["name"],
    "additionalProperties": False,
}


def with_schema(folder: Path, schema: Any) -> BaseScorer:
    (folder / "call.schema.json").write_text(json.dumps(schema))
    scorer = scorer_of("json_schema", schema_file="call.schema.json")
    scorer.read_files(folder)
    return scorer


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"name": "weather", "days": 3}', 1),
        ('```json\n{"days": 3, "name": "weather"}\n```', 1),
        ('{"name": "weather", "days": 0}', 0),
        ('{"name": "weather", "days": "3"}', 0),
        ('{"name": "weather", "city": "Oslo"}', 0),
        ('{"days": 3}', 0),
        ('Sure: {"name": "weather"}', 0),
        ("[" * 100_000, 0),
    ],
)
def test_a_reply_is_valid_or_not(tmp_path: Path, reply: str, expected: float) -> None:
    assert score(with_schema(tmp_path, SCHEMA), reply, None) == expected


def test_the_draft_is_that_which_the_schema_names(tmp_path: Path) -> None:
    both = {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}
    old = {**both, "$schema": "http://json-schema.org/draft-07/schema#"}
    assert score(with_schema(tmp_path, both), '["a", 1]', None) == 1
    assert score(with_schema(tmp_path, old), '["a", 1]', None) == 0  # `items` alone is known to it


def test_a_reply_nested_too_deep_is_not_valid(tmp_path: Path) -> None:
    nested = {"type": "array", "items": {"$ref": "#"}}
    assert score(with_schema(tmp_path, nested), "[[[]]]", None) == 1
    assert score(with_schema(tmp_path, nested), "[" * 900 + "]" * 900, None) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "must be a JSON Schema, but is not JSON"),
        ('{"type": "strnig"}', r"is none at \$\.type: 'strnig' is not valid"),
        ("{}", "an object with a rule"),
        ("[]", "an object with a rule"),
    ],
)
def test_what_is_no_schema_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    write_items(tmp_path, {"prompt": "x"})
    if content is not None:
        (tmp_path / "call.schema.json").write_text(content)
    with pytest.raises(MergetuneError, match=rf"call\.schema\.json: .*{message}"):
        read_suite(write_suite(tmp_path, TASK))


def test_nothing_is_fetched_for_a_schema(tmp_path: Path) -> None:
    scorer = with_schema(tmp_path, {"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(MergetuneError, match="every `\\$ref` must lead to a place in this file"):
        score(scorer, "1", None)


def test_an_answer_is_a_valid_reply_and_so_an_example(tmp_path: Path) -> None:
    with_schema(tmp_path, SCHEMA)
    write_items(tmp_path, *({"prompt": str(n), "answer": {"name": "weather", "days": n}} for n in (1, 2, 3)))
    examples = {"fewshot_items": "items.jsonl", "num_fewshot": 1}
    (bound,) = Evaluator(read_suite(write_suite(tmp_path, {**TASK, **examples}))).tasks.values()
    assert json.loads(bound.target(0)) == {"name": "weather", "days": 1}
    write_items(tmp_path, {"prompt": "x", "answer": {"days": 1}})
    with pytest.raises(MergetuneError, match="line 1: `answer`, where it is there, must be a reply that is"):
        read_suite(write_suite(tmp_path, TASK))
    write_items(tmp_path, {"prompt": "x"})
    assert read_suite(write_suite(tmp_path, TASK)).items
    with pytest.raises(MergetuneError, match="line 1: a few-shot example needs `answer`"):
        read_suite(write_suite(tmp_path, {**TASK, **examples}))


def test_the_rules_follow_the_schema_wherever_it_lies(tmp_path: Path) -> None:
    def rules(folder: str, schema: Any) -> str:
        place = tmp_path / folder
        place.mkdir()
        with_schema(place, schema)
        write_items(place, {"prompt": "x"}, {"prompt": "y"})
        return Evaluator(read_suite(write_suite(place, TASK))).rules

    assert rules("a", SCHEMA) == rules("b", SCHEMA) != rules("c", {"type": "object"})
