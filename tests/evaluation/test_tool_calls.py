"""The scorer of tool calls: what the Berkeley leaderboard's own checker says, parts of a score, answers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

import bfcl
from mergetune.errors import MergetuneError
from mergetune.evaluation.accepted_calls import AcceptedCall, accepted_calls
from mergetune.evaluation.call_formats import CallFormat, write_calls
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Item, ToolCall
from mergetune.evaluation.scorers import Scorer, ToolCallsScorer
from mergetune.evaluation.suite import read_suite
from mergetune.evaluation.tool_schemas import tool_schemas

needs_bfcl = pytest.mark.skipif(
    not bfcl.IS_INSTALLED, reason="the oracle: pip install --no-deps bfcl-eval tenacity"
)
# Answers in the leaderboard's data that its own checker refuses in every reply.
IMPOSSIBLE = {
    *("live_simple_106-63-0", "live_simple_112-68-0"),  # a required argument without an accepted value
    *("live_multiple_862-181-3", "live_multiple_964-207-0"),  # an argument that the function lacks
}
SCORER = ToolCallsScorer()
LOSSLESS: tuple[CallFormat, ...] = ("hermes", "llama_json", "mistral", "json", "pythonic")


def is_right(item: Item, reply: str, **options: Any) -> bool:
    (score,) = ToolCallsScorer(**options).score([item], [reply])
    assert score in (0, 1)
    return score == 1


@needs_bfcl
@pytest.mark.parametrize("category", bfcl.CATEGORIES)
def test_every_answer_of_the_leaderboard_has_a_reply_that_is_right_for_both(category: str) -> None:
    for name, item in bfcl.items(category).items():
        if name in IMPOSSIBLE:
            assert SCORER.check_item(item)
            continue
        assert SCORER.check_item(item) is None, name
        reply = SCORER.answer_text(item)
        assert is_right(item, reply), name
        calls = [ToolCall(**json.loads(text)) for text in reply.split("\n") if text.startswith("{")]
        assert bfcl.accepts(category, item, calls), name


def accepted(draw: random.Random, item: Item) -> list[ToolCall]:
    """Return calls of accepted values, drawn; of what is optional, half is left out."""
    schemas = tool_schemas(item.tools)
    calls = []
    for call in accepted_calls(item.answer):
        shuffled = {key: shuffle(draw, own) for key, own in call.arguments.items()}
        arguments = AcceptedCall(call.name, shuffled).first(schemas[call.name]).arguments
        left_out = {key for key in arguments if draw.random() < 0.5} - call.needed(schemas[call.name])
        kept = {key: value for key, value in arguments.items() if key not in left_out}
        calls.append(ToolCall(name=call.name, arguments=kept))
    return calls


def shuffle(draw: random.Random, values: Any) -> list[Any]:
    inner = [
        {key: draw.sample(own, len(own)) for key, own in each.items()} if isinstance(each, dict) else each
        for each in values
    ]
    return draw.sample(inner, len(inner))


class Changes:
    """Ways in which a reply differs from a right one; many leave it right."""

    def __init__(self, draw: random.Random, item: Item) -> None:
        self.draw = draw
        self.schemas = tool_schemas(item.tools)

    def other_name(self, calls: list[ToolCall]) -> list[ToolCall]:
        name = self.draw.choice([*(self.schemas.keys() - {calls[0].name}), f"{calls[0].name}_2"])
        return [calls[0].model_copy(update={"name": name}), *calls[1:]]

    def argument_dropped(self, calls: list[ToolCall]) -> list[ToolCall]:
        return self._with_arguments(calls, lambda own: dict([*own.items()][1:]))

    def argument_added(self, calls: list[ToolCall]) -> list[ToolCall]:
        declared = [key for schema in self.schemas.values() for key in schema["properties"]]
        added: dict[str, Any] = {
            self.draw.choice(["verbose", *declared]): self.draw.choice([True, 1, "", "x", [], None])
        }
        return self._with_arguments(calls, lambda own: {**added, **own})

    def other_value(self, calls: list[ToolCall]) -> list[ToolCall]:
        return self._with_value(calls, self._another)

    def other_type(self, calls: list[ToolCall]) -> list[ToolCall]:
        return self._with_value(calls, self._retyped)

    def other_writing(self, calls: list[ToolCall]) -> list[ToolCall]:
        return self._with_value(calls, self._rewritten)

    def call_added(self, calls: list[ToolCall]) -> list[ToolCall]:
        return [*calls, self.draw.choice([*calls, *(ToolCall(name=name) for name in self.schemas)])]

    def call_dropped(self, calls: list[ToolCall]) -> list[ToolCall]:
        return self.draw.sample(calls, len(calls) - 1)

    def other_order(self, calls: list[ToolCall]) -> list[ToolCall]:
        mixed = [dict(self.draw.sample([*call.arguments.items()], len(call.arguments))) for call in calls]
        pairs = zip(calls, mixed, strict=True)
        made = [ToolCall(name=call.name, arguments=arguments) for call, arguments in pairs]
        return self.draw.sample(made, len(made))

    def _with_arguments(self, calls: list[ToolCall], change: Callable[[Any], Any]) -> list[ToolCall]:
        at = self.draw.randrange(len(calls))
        changed = calls[at].model_copy(update={"arguments": change(calls[at].arguments)})
        return [*calls[:at], changed, *calls[at + 1 :]]

    def _with_value(self, calls: list[ToolCall], change: Callable[[Any], Any]) -> list[ToolCall]:
        def changed(own: dict[str, Any]) -> dict[str, Any]:
            key = self.draw.choice([*own]) if own else None
            return {name: change(value) if name == key else value for name, value in own.items()}

        return self._with_arguments(calls, changed)

    def _another(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value + self.draw.choice([1, 0.5, -3])
        if isinstance(value, str):
            return self.draw.choice([f"{value} more", value[1:], value[::-1]])
        if isinstance(value, list):
            each = [self._another(one) for one in value]
            return self.draw.choice([value[::-1], value[1:], [*value, *value[:1]], each])
        key = self.draw.choice([*value, "more"])
        return self.draw.choice([{**value, key: self._another(value.get(key, 1))}, {**value, "more": 1}, {}])

    def _retyped(self, value: Any) -> Any:
        options: list[Any] = [str(value), [value], None, {"value": value}]
        if isinstance(value, (int, float)):
            options += [int(value), float(value)] * 2
        if isinstance(value, list):
            options += [[self._retyped(one) for one in value]] * 3
        return self.draw.choice(options)

    def _rewritten(self, value: Any) -> Any:
        if isinstance(value, str):
            mark = self.draw.choice(" ,./-_*^'\"!:")
            texts = [value.upper(), value.title(), value.replace(" ", mark), f"{value}{mark}"]
            return self.draw.choice(texts)
        if isinstance(value, list):
            return [self._rewritten(one) for one in value]
        if isinstance(value, dict):
            return {key: self._rewritten(one) for key, one in value.items()}
        return value


CHANGES = (
    *(Changes.other_name, Changes.argument_dropped, Changes.argument_added, Changes.other_value),
    *(Changes.other_type, Changes.other_writing, Changes.call_added, Changes.call_dropped),
    Changes.other_order,
)
MAKE_WRONG = {Changes.other_name, Changes.argument_dropped, Changes.call_added, Changes.call_dropped}


@needs_bfcl
@pytest.mark.parametrize("change", CHANGES)
def test_changed_replies_are_judged_as_by_the_leaderboard(change: Callable[..., list[ToolCall]]) -> None:
    draw = random.Random(f"{change.__name__}")
    verdicts = []
    for _ in range(60):
        category = draw.choice(bfcl.CATEGORIES)
        item = draw.choice([*bfcl.items(category).values()])
        calls = change(Changes(draw, item), accepted(draw, item))
        form = draw.choice(LOSSLESS)
        reply = write_calls(calls, form) if calls else "I cannot do that."
        read = bfcl.decoded(reply) if form == "pythonic" and calls else calls
        verdicts.append(bfcl.accepts(category, item, read))
        assert is_right(item, reply) == verdicts[-1], reply
    assert True in verdicts or change in MAKE_WRONG
    assert False in verdicts or change is Changes.other_order


@needs_bfcl
def test_a_reply_that_is_cut_off_makes_no_call_and_is_no_refusal_to_call() -> None:
    draw = random.Random(0)
    for category in bfcl.CATEGORIES:
        for item in draw.sample([*bfcl.items(category).values()], 10):
            for form in LOSSLESS:
                reply = write_calls(accepted(draw, item), form)
                cut = reply[: max(reply.rfind("}"), reply.rfind(")"))]
                assert not is_right(item, cut), cut
                assert not is_right(item.model_copy(update={"answer": []}), cut), cut


@needs_bfcl
@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance", "live_relevance"])
def test_relevance_is_judged_as_by_the_leaderboard(category: str) -> None:
    for item in bfcl.items(category).values():
        name = next(iter(tool_schemas(item.tools)), "f")
        for reply in (f"[{name}(a=1)]", f"[{name}()]", "[]", "I cannot do that.", f"Use `{name}`?", ""):
            theirs = bfcl.makes_a_call(reply)
            assert is_right(item.model_copy(update={"answer": []}), reply) == (not theirs)
            if item.tools:
                assert is_right(item.model_copy(update={"answer": {"call": "any"}}), reply) == theirs


def tool(name: str, required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    schemas = {key: own if isinstance(own, dict) else {"type": own} for key, own in properties.items()}
    return {"name": name, "parameters": {"type": "dict", "properties": schemas, "required": [*required]}}


@needs_bfcl
@pytest.mark.parametrize(
    ("declared", "answer", "reply", "theirs", "ours"),
    [
        pytest.param(
            tool("f", a="integer", b="integer"),
            [{"f": {"a": [1], "b": [2, ""]}}, {"f": {"a": [1], "b": [2]}}],
            "[f(a=1, b=2), f(a=1)]",
            False,
            True,
            id="it takes the first call that suits each answer, and not the pairs that suit all",
        ),
        pytest.param(
            tool("f", a="dict"),
            [{"f": {"a": [{"on": [True]}]}}],
            "[f(a={'on': 1})]",
            True,
            False,
            id="in objects 1 is true to it",
        ),
        pytest.param(
            tool("f", a={"type": "array", "items": {"type": "integer"}}),
            [{"f": {"a": [[1, 2]]}}],
            "[f(a=(1, 2))]",
            False,
            True,
            id="JSON, in which servers hand calls on, has no tuples",
        ),
        pytest.param(
            tool("f", a="integer"), [{"f": {"a": [5]}}], "[f(a=2 + 3)]", True, False, id="it evaluates"
        ),
        pytest.param(
            tool("f", a="string"), [{"f": {"a": ["x"]}}], "[f(a=x)]", True, False, id="a name is a text to it"
        ),
        pytest.param(
            tool("f", a="integer"), [{"f": {"a": [5, ""]}}], "[f(5)]", True, False,
            id="it drops arguments without a name",
        ),
        pytest.param(
            tool("f", a="integer"), [{"f": {"a": [5]}}], "f(a=5)", True, False, id="it puts brackets around"
        ),
    ],
)  # fmt: skip
def test_differences_from_the_leaderboard_in_calls(
    declared: dict[str, Any], answer: list[Any], reply: str, theirs: bool, ours: bool
) -> None:
    item = bfcl.item([declared], answer)
    assert SCORER.check_item(item) is None
    assert bfcl.accepts("parallel", item, bfcl.decoded(reply)) == theirs
    assert is_right(item, reply) == ours


@needs_bfcl
@pytest.mark.parametrize(
    ("reply", "theirs"),
    [
        pytest.param("[g(a=1)]", True, id="a tool that is not there may be called"),
        pytest.param("[f(a=1", False, id="a malformed call is none"),
    ],
)
def test_differences_from_the_leaderboard_in_relevance(reply: str, theirs: bool) -> None:
    """Neither is right for us, be a call wanted or none."""
    assert bfcl.makes_a_call(reply) == theirs
    assert not is_right(bfcl.item([tool("f", a="integer")], {"call": "any"}), reply)
    assert not is_right(bfcl.item([tool("f", a="integer")], []), reply)


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "units": {"type": "array", "items": {"type": "string"}},
            "share": {"type": "number"},
            "options": {"type": "object"},
            "anything": {},
        },
        "required": ["city"],
    },
}
CLOCK = {"name": "clock"}


def asked(answer: Any) -> Item:
    return bfcl.item([WEATHER, CLOCK], answer)


def hermes(*calls: tuple[str, dict[str, Any]]) -> str:
    return write_calls([ToolCall(name=name, arguments=arguments) for name, arguments in calls])


OSLO = {"name": "weather", "arguments": {"city": "Oslo", "days": 3}}
OPENAI = {"type": "function", "function": {"name": "weather", "arguments": json.dumps(OSLO["arguments"])}}
ACCEPTED = {"weather": {"city": ["Oslo", "Oslo, Norway"], "days": [3, ""]}}


@pytest.mark.parametrize(
    ("answer", "right", "wrong", "target"),
    [
        (
            [OSLO],
            [hermes(("weather", {"days": 3, "city": "oslo"}))],
            [hermes(("weather", {"city": "Oslo"})), hermes(("weather", {"city": "Oslo", "days": 4})), "No."],
            'weather(city="Oslo", days=3)',
        ),
        (
            [OPENAI],
            [hermes(("weather", {"city": "Oslo", "days": 3}))],
            [hermes(("weather", {"city": "Bergen", "days": 3}))],
            'weather(city="Oslo", days=3)',
        ),
        (
            [ACCEPTED, {"clock": {}}],
            [hermes(("clock", {}), ("weather", {"city": "Oslo Norway"}))],
            [hermes(("weather", {"city": "Oslo"})), hermes(("clock", {}), ("weather", {"city": ""}))],
            'weather(city="Oslo" or "Oslo, Norway", days=3 or nothing); clock()',
        ),
        (
            [{"weather": {"city": ["x"], "options": [{"a": [{"b": [1]}], "c": ["D", ""]}], "share": [2]}}],
            [hermes(("weather", {"share": 2.0, "city": "x", "options": {"c": "d", "a": {"b": [1]}}}))],
            [hermes(("weather", {"city": "x", "options": {"c": "d"}, "share": 2}))],
            'weather(city="x", options={"a": {"b": [1]}, "c": "D"}, share=2)',
        ),
        (
            [{"name": "weather", "arguments": {"city": "x", "options": {"a": {"b": [1]}, "c": "D"}}}],
            [hermes(("weather", {"city": "x", "options": {"c": "d", "a": {"b": [1]}}}))],
            [hermes(("weather", {"city": "x", "options": {"a": {"b": [1]}}}))],
            'weather(city="x", options={"a": {"b": [1]}, "c": "D"})',
        ),
        ([], ["", "Hello.", '{"a": 1}', "[1]"], [hermes(("clock", {})), "<tool_call>{"], "no call"),
        ("I can't.", ["Something else."], [hermes(("clock", {}))], "no call"),
        (f"Let me look. {hermes(('clock', {}))}", [hermes(("clock", {}))], ["Let me look."], "clock()"),
        ({"call": "any"}, [hermes(("clock", {}), ("weather", {}))], ["No.", hermes(("f", {}))], "any call"),
    ],
)
def test_forms_of_answers(answer: Any, right: list[str], wrong: list[str], target: str) -> None:
    item = asked(answer)
    assert SCORER.check_item(item) is None
    assert [is_right(item, reply) for reply in (*right, *wrong)] == [True] * len(right) + [False] * len(wrong)
    assert SCORER.target_text(item) == target


@pytest.mark.parametrize("form", get_args(CallFormat))
@pytest.mark.parametrize(
    ("answer", "has_reply"),
    [
        *(([OSLO], True), ([ACCEPTED], True), ([OSLO, OPENAI], True), ("Hi.", True)),
        *(([], False), ({"call": "any"}, False)),
    ],
)
def test_the_wanted_reply_is_right(form: CallFormat, answer: Any, has_reply: bool) -> None:
    scorer = ToolCallsScorer(format=form)
    reply = scorer.wanted_reply(asked(answer))
    assert (reply is not None) == has_reply
    assert scorer.answer_text(asked(answer)) == (scorer.reply_text(reply) if reply else "")
    assert reply is None or is_right(asked(answer), scorer.reply_text(reply), format=form)
    assert (scorer.check_item(asked(answer), is_example=True) is None) == has_reply


TWO = [("weather", {"city": "Oslo", "days": 3}), ("clock", {})]


@pytest.mark.parametrize(
    ("answer", "calls", "name", "arguments", "schema"),
    [
        ([OSLO], TWO[:1], 1, 1, 1),
        ([OSLO], TWO, 2 / 3, 2 / 3, 1),
        ([OSLO, OPENAI], TWO[:1], 2 / 3, 2 / 3, 1),
        ([OSLO], [("weather", {"city": "Rome", "days": 3})], 1, 1 / 2, 1),
        ([OSLO], [("weather", {"city": "Rome", "days": 3, "place": "Oslo"})], 1, 1 / 3, 1),
        ([OSLO], [("weather", {"days": 3})], 1, 1 / 2, 0),
        ([OSLO], [("weather", {"city": "Oslo", "days": 0})], 1, 1 / 2, 0),
        ([OSLO], [("forecast", {"city": "Oslo"}), *TWO[:1]], 2 / 3, 2 / 3, 1 / 2),
        ([OSLO], [], 0, 0, 0),
        ([OSLO, {"name": "clock", "arguments": {}}], TWO[::-1], 1, 1, 1),
        ([], [], 1, 1, 1),
        ([], TWO, 0, 0, 0),
        ({"call": "any"}, [("weather", {})], 1, 1, 0),
        ({"call": "any"}, [], 0, 0, 0),
    ],
)
def test_parts(answer: Any, calls: Any, name: float, arguments: float, schema: float) -> None:
    item, reply = asked(answer), hermes(*calls)
    parts = {"name": name, "arguments": arguments, "schema": schema, "all": float(arguments == 1)}
    for part, expected in parts.items():
        scorer: Any = TypeAdapter(Scorer).validate_python({"kind": "tool_calls", "part": part})
        assert scorer.score([item], [reply]) == [pytest.approx(expected)], part
        assert scorer.score([item], ["<tool_call>{"]) == [0]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "needs `answer`"),
        (3, "must be a list of calls, such as .*, but is 3"),
        ({"call": "some"}, 'but is {"call": "some"}'),
        (OSLO, "must be a list of calls"),
        ([{"name": "weather"}], "no such call is"),
        ([{"weather": {"city": "Oslo"}}], "no such call is"),
        ([{"weather": {"options": [{"a": 1}]}}], "no such call is"),
        ([{"name": "wether", "arguments": {}}], "calls `wether`, which is not among `tools`. Did you mean"),
        ([{"name": "clock", "arguments": {"zone": "UTC"}}], "an argument `zone` that it lacks"),
        ([{"name": "weather", "arguments": {}}], "no value for the argument `city` that `weather` requires"),
        ([{"weather": {"city": []}}], "no value for the argument `city`"),
        ([{"weather": {"city": ["x"], "options": [{}], "days": ["1 + n"], "share": [1]}}], None),
        ([{"weather": {"city": ["x"], "days": ["", 1.5]}}], None),
        ([{"name": "weather", "arguments": {"city": "x", "units": [1, "x"]}}], None),
        ([{"name": "weather", "arguments": {"city": "x", "units": ["x", 1]}}], "its schema does not take"),
        ("<tool_call>{", "begins a call that cannot be read"),
        (hermes(("forecast", {})), "calls `forecast`, which is not among `tools`"),
    ],
)
def test_answers_that_no_reply_can_have_are_refused(answer: Any, problem: str | None) -> None:
    found = SCORER.check_item(asked(answer))
    assert found is None if problem is None else re.search(problem, found or "")


@pytest.mark.parametrize(
    ("tools", "options", "problem"),
    [
        ([], {}, "the item has no `tools`"),
        ([{"name": "f"}], {}, "each of `tools` must be an object such as"),
        ([{"function": {"name": "f", "parameters": {"required": True}}}], {}, "each of `tools` must be"),
        ([{"function": CLOCK}, {"function": CLOCK}], {}, "a name of its own, but two are `clock`"),
        ([{"function": tool("f", a="date")}], {"part": "schema"}, "`f` must be a JSON Schema, but at"),
        ([{"function": tool("f", a="date")}], {}, None),
    ],
)
def test_tools_that_are_none_are_refused(tools: list[Any], options: Any, problem: str | None) -> None:
    item = Item(prompt="x", tools=tuple(tools), answer={"call": "any"})
    found = ToolCallsScorer(**options).check_item(item)
    assert found is None if problem is None else re.search(problem, found or "")


def test_stop_strings_and_formats_that_leave_no_right_reply_are_refused() -> None:
    assert SCORER.check_item(asked([OSLO]), ["</tool_call>", "\n\n"]) is None
    assert "stop string 'Oslo'" in (SCORER.check_item(asked([OSLO]), ["Oslo"]) or "")
    item = bfcl.item([{"name": "get-time"}], [{"get-time": {}}])
    assert SCORER.check_item(item) is None
    assert "no reply in the format `pythonic`" in (ToolCallsScorer(format="pythonic").check_item(item) or "")


def test_items_are_scored_as_lm_eval_hands_them_on(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": WEATHER}]
    answers = [[{"weather": {"city": ["Oslo"], "share": [0.5]}}], [], {"call": "any"}, "Hello."]
    rows = [{"prompt": str(answer), "tools": tools, "answer": answer} for answer in answers]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"items": "items.jsonl", "scorer": "tool_calls"}
    suite = {
        "description": "",
        "chat_template": True,
        "holdout": 0,
        "objectives": {"calls": {"tasks": [task]}},
    }
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    (bound,) = Evaluator(read_suite(tmp_path / "suite.yaml")).tasks.values()
    reply = hermes(("weather", {"city": "oslo", "share": 0.5}))
    scores = bound.measured({index: [reply] for index in range(len(answers))})
    assert [scores[index]["score"] for index in range(len(answers))] == [1, 0, 1, 0]


def test_an_item_without_tools_is_no_test_of_calls() -> None:
    problem = ToolCallsScorer().check_item(Item(prompt="2 + 2 =", answer="4"))
    assert problem is not None
    assert "the item has no `tools`" in problem


def test_a_schema_that_refers_to_what_it_does_not_hold_ends_with_an_error() -> None:
    item = bfcl.item([tool("f", a={"$ref": "https://example.org/a.json"})], {"call": "any"})
    with pytest.raises(MergetuneError, match="`f` must hold every schema that they refer to"):
        ToolCallsScorer(part="schema").score([item], [hermes(("f", {"a": 1}))])
