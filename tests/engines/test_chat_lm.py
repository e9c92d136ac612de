"""A served model is asked as servers take conversations with tools, and the calls it found are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.api.instance import Instance

from mergetune.engines.chat_lm import served_lm
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from plain_server import plain_server

TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
CALL = {"type": "function", "id": "c1", "function": {"name": "get_time", "arguments": '{"zone": "UTC"}'}}
FIRST = {"role": "user", "content": "What time is it in Greenwich?"}
ROWS = [
    {"messages": [FIRST, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TIME]},
    {
        "messages": [
            FIRST,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "12:30"},
            {"role": "assistant", "content": "Half past twelve."},
        ],
        "tools": [TIME],
    },
]


def write_suite(folder: Path) -> Path:
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    task = {"items": "items.jsonl", "scorer": "tool_calls", "max_new_tokens": 32, "stop": ["\n"]}
    suite = {
        "description": "x",
        "chat_template": True,
        "template_arguments": {"enable_thinking": False},
        "holdout": 0,
        "objectives": {"calls": {"tasks": [task]}},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


@pytest.mark.parametrize(("zone", "expected"), [("UTC", [1.0, 1.0]), ("CET", [0.0, 1.0])])
def test_calls_that_the_server_found_are_scored(zone: str, expected: list[float], tmp_path: Path) -> None:
    """Their text is made here, and no stop string cuts it off."""
    seen: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body)
        made = {"name": "get_time", "arguments": json.dumps({"zone": zone})}
        message: dict[str, Any] = {"content": "Half past twelve."}
        if body["messages"][-1]["role"] == "user":
            message = {"content": None, "tool_calls": [{"type": "function", "id": "x", "function": made}]}
        return 200, {"choices": [{"message": message}]}

    with plain_server(answer) as url:
        found = Evaluator(read_suite(write_suite(tmp_path))).measure(
            served_lm(url, None, None, 1, None), "search"
        )
    assert found.items["score"].tolist() == expected
    assert all(body["path"] == "/v1/chat/completions" for body in seen)
    assert all(body["tools"] == [TIME] for body in seen)
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in seen)
    (first,), (_, call, result) = sorted((body["messages"] for body in seen), key=len)
    assert first == FIRST
    assert [json.loads(each["function"]["arguments"]) for each in call["tool_calls"]] == [{"zone": "UTC"}]
    assert isinstance(call["tool_calls"][0]["function"]["arguments"], str)
    assert (call["tool_calls"][0]["id"], result["tool_call_id"]) == ("c1", "c1")


def test_lengths_are_known_where_a_template_here_takes_the_conversation(tiny_base: Path) -> None:
    """The server has its own template, which may write tools where that beside the tokenizer does not."""
    writes_all = "{{ tools | tojson }}{% for each in messages %}{{ each | tojson }}{% endfor %}"
    excess = []
    with plain_server(lambda _: (200, {})) as url:
        for template in (None, writes_all):
            lm = served_lm(url, None, str(tiny_base), 1, None, template)
            prompt = lm.apply_chat_template([FIRST], tools=[TIME])
            settings: dict[str, Any] = {"max_gen_toks": lm.max_length, "until": []}
            excess.append(lm.excess_tokens(Instance("generate_until", {}, (prompt, settings), 0)))
    assert excess[0] == 0
    assert excess[1] > 0
