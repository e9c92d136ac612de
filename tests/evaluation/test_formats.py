"""Forms of data: each is told by its keys, becomes the same items, and a broken row of any is one message."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergetune.errors import MergetuneError
from mergetune.evaluation.formats import FORMS, fields_of, form_of
from mergetune.evaluation.formats.bfcl import json_schema
from mergetune.evaluation.item_files import ItemFile, ItemSource, read_items
from mergetune.evaluation.items import Item, Message, ToolCall, load_json
from mergetune.evaluation.preview import scorer_of

ASK, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CALLED = [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
RESULT = {"role": "tool", "content": "4 °C", "tool_call_id": "c1"}
QUESTION = {
    "id": "simple_0",
    "question": [[{"role": "system", "content": "Be exact."}, ASK]],
    "function": [
        {"name": "math.area", "parameters": {"type": "dict", "properties": {"base": {"type": "float"}}}}
    ],
    "ground_truth": [{"math.area": {"base": [10.0]}}],
}
# A row of each form, by the form's name.
ROWS: dict[str, dict[str, Any]] = {
    "prompts with answers": {"prompt": "Hi", "answer": "Hello", "system": "Be kind.", "tools": [WEATHER]},
    "prompts": {"prompt": "Hi"},
    "OpenAI chat": {"messages": [*CALLED, RESULT, REPLY], "tools": [TOOL]},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            {"from": "observation", "value": "4 °C"},
            {"from": "gpt", "value": "Hello"},
        ],
        "system": "Be kind.",
        "tools": json.dumps([WEATHER]),
    },
    "prompts of messages": {"prompt": [ASK], "answer": "Hello"},
    "prompts with completions": {"prompt": [ASK], "completion": [REPLY]},
    "preferences": {"chosen": [ASK, REPLY], "rejected": [ASK, {"role": "assistant", "content": "Go away"}]},
    "Alpaca": {"instruction": "Translate:", "input": "Hi", "output": "Hallo", "history": [["a", "b"]]},
    "BFCL questions": QUESTION,
    "samples of Inspect": {"input": [ASK], "target": ["Hello", "Hi"], "choices": ["Hello", "Hi"], "id": 1},
    "samples of OpenAI's evals": {"input": [ASK], "ideal": "Hello"},
}
ODD: list[Any] = [
    *(None, "", "x", 0, 2.5, True, [], {}, [None], ["x"], [[]], [{}], {"a": 1}, "[", "[1]", "{}"),
]


def item_of(row: dict[str, Any]) -> Item:
    return Item.model_validate(fields_of(form_of([row]), row))


def read(folder: Path, *rows: Any, **options: Any) -> ItemFile:
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_items(ItemSource("items.jsonl", **options), folder)


def test_every_form_has_a_row() -> None:
    assert {form.name for form in FORMS} == ROWS.keys()


@pytest.mark.parametrize("rows", [0, 1])
def test_the_first_rows_say_the_form_and_the_others_must_follow(tmp_path: Path, rows: int) -> None:
    pairs = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}]
    message = (
        rf"line {2 - rows}: must be as the first rows are, prompts with completions .*but has `prompt`\."
    )
    with pytest.raises(MergetuneError, match=message):
        read(tmp_path, pairs[rows], pairs[1 - rows])


@pytest.mark.parametrize("name", ROWS)
def test_a_file_is_taken_for_what_it_is(name: str, tmp_path: Path) -> None:
    found = read(tmp_path, *[{**ROWS[name], "language": "en", "metadata": {"topic": "x"}}] * 3)
    has_tools = " with tools" if found.items[0].tools else ""
    assert found.summary == f"items.jsonl: 3 items, taken for {name}{has_tools}"
    for item in found.items:
        assert {"language": "en", "topic": "x"}.items() <= item.metadata.items()
        assert item.metadata.get("id") == ROWS[name].get("id")


def test_a_plain_item_is_the_same_whatever_stands_beside_it() -> None:
    """Items of version 0.1 keep their ids: other forms' keys do not count beside a prompt and its answer."""
    beside = {
        "messages": [ASK],
        "chosen": "a",
        "rejected": "b",
        "completion": "c",
        "target": "d",
        "input": "e",
    }
    plain, among = (
        item_of({"prompt": "Hi", "answer": "x"}),
        item_of({"prompt": "Hi", "answer": "x", **beside}),
    )
    assert plain.model_dump_json(exclude={"metadata"}) == among.model_dump_json(exclude={"metadata"})
    assert json.loads(plain.model_dump_json()).keys() == {"prompt", "answer", "choices", "patterns", "system"}
    assert among.metadata == beside


def test_a_conversation_of_openai() -> None:
    item = item_of(ROWS["OpenAI chat"])
    call = ToolCall(name="weather", arguments={"city": "Oslo"}, id="c1")
    assert item.messages == (
        Message(role="user", content="Hi"),
        Message(role="assistant", tool_calls=(call,)),
        Message(role="tool", content="4 °C", tool_call_id="c1"),
    )
    assert (item.prompt, item.target, item.answer) == (
        "Hi",
        Message(role="assistant", content="Hello"),
        "Hello",
    )
    assert item.tools == (TOOL,)


def test_what_is_written_in_several_ways_is_read_as_one() -> None:
    """TRL's arguments are objects; OpenAI's older form has `functions` and `function_call`."""
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    expected = item_of({"messages": CALLED, "tools": [TOOL]})
    assert expected.target is not None
    assert expected.answer == [call]
    ways: list[dict[str, Any]] = [
        {"tool_calls": [{"id": "c1", "function": call}]},
        {"tool_calls": [{"id": "c1", **call}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"id": "c1", "function": "weather", "arguments": {"city": "Oslo"}}]},
    ]
    for way in ways:
        row = {
            "messages": [ASK, {"role": "assistant", "content": "", **way}],
            "functions": json.dumps([WEATHER]),
        }
        assert item_of(row) == expected
    old = item_of({"messages": [ASK, {"role": "assistant", "content": None, "function_call": call}]})
    assert old.target == Message(role="assistant", tool_calls=(ToolCall.model_validate(call),))
    gpt = item_of(
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": call}]}
    )
    assert gpt.target == old.target


def test_parts_of_text_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    item = item_of({"messages": messages})
    assert (item.system, item.prompt, item.target, item.answer) == ("Be kind.", "Hi there", None, None)
    assert [message.role for message in item.messages] == ["user"]


def test_a_result_that_is_json_becomes_text() -> None:
    item = item_of({"messages": [*CALLED, {**RESULT, "content": {"degrees": 4}}, REPLY]})
    assert item.messages[-1].content == '{"degrees": 4}'


def test_share_gpt_is_the_chat_that_it_says() -> None:
    chat, item = item_of(ROWS["OpenAI chat"]), item_of(ROWS["ShareGPT"])
    assert item.system == "Be kind."
    assert item.tools == chat.tools
    assert (item.target, item.prompt) == (chat.target, chat.prompt)
    assert [m.role for m in item.messages] == [m.role for m in chat.messages]


@pytest.mark.parametrize(
    "row",
    [
        ROWS["preferences"],
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [ASK], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "Go away"}]},
        {"prompt": "Hi", **ROWS["preferences"]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go away"},
        },
    ],
)
def test_a_preference_is_a_choice(row: dict[str, Any]) -> None:
    item = item_of(row)
    assert (item.prompt, item.choices, item.answer) == ("Hi", ("Hello", "Go away"), 0)


def test_prompts_and_completions() -> None:
    assert item_of({"prompt": "Hi", "completion": " Hello"}).answer == " Hello"
    item = item_of(ROWS["prompts with completions"])
    assert item == item_of({"messages": [ASK, REPLY]})


def test_alpaca_puts_the_input_on_the_next_line() -> None:
    item = item_of(ROWS["Alpaca"])
    assert (item.prompt, item.answer) == ("Translate:\nHi", "Hallo")
    assert [message.content for message in item.messages] == ["a", "b", "Translate:\nHi"]
    assert item_of({"instruction": "Greet.", "input": "", "output": "Hi"}) == item_of(
        {"prompt": "Greet.", "answer": "Hi"}
    )


def test_samples_have_one_answer_or_several() -> None:
    assert item_of({"input": "Hi", "target": "B", "choices": ["a", "b"]}).answer == "B"
    assert item_of(ROWS["samples of Inspect"]).answer == ["Hello", "Hi"]
    assert item_of({"input": "Hi", "ideal": ["Hello"]}).answer == ["Hello"]


def test_questions_of_bfcl_have_tools_with_types_of_json_schema(tmp_path: Path) -> None:
    row = {key: value for key, value in QUESTION.items() if key != "ground_truth"}
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({key: QUESTION[key] for key in ("id", "ground_truth")})
    )
    found = read(tmp_path, row, answers="answers.jsonl")
    (item,) = found.items
    assert found.form == "BFCL questions with tools with answers from answers.jsonl"
    assert (item.prompt, item.system, item.metadata) == ("Hi", "Be exact.", {"id": "simple_0"})
    assert item.answer == QUESTION["ground_truth"] == item_of(QUESTION).answer
    base = {"type": "number", "format": "float"}
    parameters = {"type": "object", "properties": {"base": base}}
    assert item.tools == ({"type": "function", "function": {"name": "math.area", "parameters": parameters}},)
    assert read(tmp_path, row, answers="none").items[0].answer == []


def test_a_parameter_may_be_called_type() -> None:
    inner = {"type": {"type": "any"}, "items": {"type": "tuple", "items": {"type": "dict"}}}
    assert json_schema({"type": "dict", "properties": inner, "required": ["type"]}) == {
        "type": "object",
        "properties": {"type": {"type": "string"}, "items": {"type": "array", "items": {"type": "object"}}},
        "required": ["type"],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "has `question`, `answer`. .*`fields: {prompt: question, answer: answer}`",
        ),
        ({"text": "a", "n": 1}, "`fields: {prompt: text, answer: PATH}`"),
        ({}, "must be an item, .* but is empty"),
        ({"messages": []}, "`messages`: must have a message of the user .* but has: none"),
        ({"messages": [REPLY]}, "`messages`: must have a message of the user"),
        ({"messages": [ASK, REPLY, REPLY]}, "must have a message of the user or of a tool before the reply"),
        (
            {"messages": [ASK, {"role": "assistant", "content": ""}]},
            r"`messages\.1`: the last reply must not be empty",
        ),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            r'`messages\.0\.role`: must be a role .*but is "bot"',
        ),
        ({"messages": [{"role": "user"}]}, r"`messages\.0\.content`: must be text.*but is missing or null"),
        ({"messages": [ASK, "x"]}, r"`messages\.1`: must be JSON, but is not"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"`messages\.0\.content\.0`: must be a part of the type `text` .*`image_url`; pictures",
        ),
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            r"`messages\.1\.tool_calls\.0\.function\.arguments`: must be JSON, but is not",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            r"tool_calls\.0\.function\.name`: must be the name of a function, but is missing",
        ),
        (
            {"messages": [ASK, REPLY], "tools": [{"type": "web_search"}]},
            r"`tools\.0\.name`: must be the name",
        ),
        ({"messages": [ASK, REPLY], "tools": "no"}, "`tools`: must be JSON, but is not"),
        (
            {"messages": [{"role": "system", "content": "a"}, ASK, REPLY], "system": "b"},
            "`system`: must not differ from the conversation's own",
        ),
        ({"prompt": "a", "completion": "b", "label": False}, "`label`: must not be false"),
        ({"prompt": "a", "completion": [ASK]}, "`completion`: must end with a message of the assistant"),
        (
            {"chosen": [ASK, REPLY], "rejected": [ASK, REPLY]},
            "`chosen`: .*must have a message of the user or of a tool",
        ),
        (
            {"prompt": "a", "chosen": [ASK, REPLY], "rejected": [REPLY]},
            "`chosen`: must have a message of the user",
        ),
        ({"instruction": "a", "history": [["x"]]}, r"`history\.0`: must be two texts"),
        ({**QUESTION, "question": [[ASK], [ASK]]}, "`question`: must have one turn, but has 2"),
        ({"question": [[ASK]], "involved_classes": []}, "`function`: must be the functions"),
        ({"input": "", "target": "x"}, "`input`: must be text that is not empty"),
        ({"input": [REPLY], "target": "x"}, "`input`: must have a message of the user"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(MergetuneError, match=rf"items\.jsonl, line 1: .*{message}"):
        read(tmp_path, row)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside a row."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield (*path, key)
        yield from places(each, (*path, key))


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_is_wrong_with_a_row_is_one_message(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Values at any place of a row are replaced or taken out: the row is read, or named."""
    row = copy.deepcopy(ROWS[name])
    for _ in range(data.draw(st.integers(1, 3))):
        if not (every := list(places(row))):
            break
        *path, last = data.draw(st.sampled_from(every))
        inner: Any = row
        for key in path:
            inner = inner[key]
        if data.draw(st.booleans()):
            del inner[last]
        else:
            inner[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    try:
        n_items, problem = len(read(tmp_path, ROWS[name], row).items), ""
    except MergetuneError as error:
        n_items, problem = 0, str(error)
    assert n_items == 2 or re.search(r"items\.jsonl, line [12]:\s", problem)


def test_numbers_in_arguments_keep_what_was_written() -> None:
    row = load_json(json.dumps({"messages": CALLED}).replace("Oslo", "1.50"))
    assert item_of(row).target is not None
    text = '{"messages": [{"role": "user", "content": "Hi"}], "answer": 1.50}'
    assert item_of(load_json(text)).answer.written == "1.50"


def test_a_float_of_bfcl_is_one_to_the_scorer_of_calls() -> None:
    """In arrays BFCL takes no integer for a `float`, though it does for a `number`."""
    scores = []
    for kind in ("float", "number"):
        items = {"type": "dict", "properties": {"sides": {"type": "array", "items": {"type": kind}}}}
        row = {**QUESTION, "function": [{"name": "area", "parameters": items}]}
        item = item_of({**row, "ground_truth": [{"area": {"sides": [[3.0, 4.5]]}}]})
        reply = '<tool_call>{"name": "area", "arguments": {"sides": [3, 4.5]}}</tool_call>'
        scores += scorer_of("tool_calls").score([item], [reply])
    assert scores == [0, 1]
