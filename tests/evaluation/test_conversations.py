"""Conversations are asked as they are: with their history, tools, turns, and no thoughts in the score."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from helpers import HERMES
from mergetune.engines.completions import TokenizerPrompts
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Item, Message, ToolCall
from mergetune.evaluation.lm_requests import ask
from mergetune.evaluation.suite import read_suite
from mergetune.evaluation.thinking import without_thoughts
from mergetune.results.slices import slices_of

TOOLS = ({"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}},)
TALK = (
    Message(role="user", content="What time is it?"),
    Message(role="assistant", tool_calls=(ToolCall(name="get_time", arguments={"zone": "UTC"}),)),
    Message(role="tool", content='{"time": "12:30"}', name="get_time"),
    Message(role="assistant", content="It is half past twelve, my lord."),
    Message(role="user", content="And tomorrow?"),
)
ITEM = Item(prompt="And tomorrow?", messages=TALK, tools=TOOLS, answer="My lord", system="Be polite.")


class Asked(TokenizerPrompts):
    """What replies to each prompt by what was written for it, and keeps the requests."""

    def __init__(self, tokenizer: Any, replies: Any = "") -> None:
        super().__init__(tokenizer)
        self.requests: list[Any] = []
        self.replies = replies

    def generate_until(self, requests: Any) -> list[str]:
        self.requests += requests
        return [self.replies if isinstance(self.replies, str) else self.replies(each) for each in requests]


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    found: Any = AutoTokenizer.from_pretrained(tiny_base)
    found.chat_template = HERMES
    return found


def evaluator_of(folder: Path, items: list[Item], task: dict[str, Any], **suite: Any) -> Evaluator:
    """Return an evaluator of these items, which a suite's file stands for."""
    row = {"messages": [{"role": "user", "content": "x"}], "answer": "y"}
    (folder / "items.jsonl").write_text("\n".join(json.dumps(row) for _ in items))
    tasks = [{"items": "items.jsonl", "scorer": "exact", **task}]
    data = {"description": "x", "chat_template": True, "holdout": 0, "objectives": {"o": {"tasks": tasks}}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(data | suite))
    read = read_suite(folder / "suite.yaml")
    return Evaluator(replace(read, items={key: tuple(items) for key in read.items}))


def contexts(evaluator: Evaluator, lm: Any) -> list[list[str]]:
    found = evaluator.requests(lm, evaluator.documents("search"))
    return [[request.args[0] for request in own] for own in found["o:items.jsonl"].values()]


def items(n: int = 2) -> list[Item]:
    return [ITEM.model_copy(update={"prompt": f"And tomorrow, {i}?"}) for i in range(n)]


def test_a_conversation_is_asked_with_its_history_tools_and_system_message(
    tmp_path: Path, tokenizer: Any
) -> None:
    (first, *_) = contexts(evaluator_of(tmp_path, items(), {}), Asked(tokenizer))
    assert first == [
        tokenizer.apply_chat_template(
            [message.as_dict() for message in ITEM.conversation],
            tools=list(TOOLS),
            tokenize=False,
            add_generation_prompt=True,
        )
    ]
    for part in ("Be polite.", "get_time", '"zone": "UTC"', "12:30", "half past twelve", "And tomorrow?"):
        assert part in first[0]


def test_every_turn_is_asked_with_what_truly_went_before(tmp_path: Path, tokenizer: Any) -> None:
    evaluator = evaluator_of(tmp_path, items(), {"score_turns": "all"})
    asked, *_ = contexts(evaluator, Asked(tokenizer))
    assert len(asked) == 3
    assert [("half past" in text, "12:30" in text) for text in asked] == [
        (False, False),
        (False, True),
        (True, True),
    ]

    def reply(request: Any) -> str:  # the second turn is right, and the third
        return "My lord" if "And tomorrow?" in request.args[0] else "It is half past twelve, my lord."

    found = evaluator.measure(Asked(tokenizer, reply), "search").items
    assert found["score"].tolist() == [pytest.approx(2 / 3)] * 2
    assert "[3] My lord" in found["response"][0]


def test_turns_with_and_without_calls_are_told_apart(tmp_path: Path, tokenizer: Any) -> None:
    first, second, third = ITEM.turns("all")
    assert first.answer == [{"name": "get_time", "arguments": {"zone": "UTC"}}]
    assert ITEM.turns("calls") == (first,)
    assert ITEM.turns("text") == (second, third)
    asked, *_ = contexts(evaluator_of(tmp_path, items(), {"score_turns": "text"}), Asked(tokenizer))
    assert ["half past" in text for text in asked] == [False, True]


def test_a_template_that_writes_no_tools_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_base)
    with pytest.raises(MergetuneError, match=r"leaves out .*get_time"):
        contexts(evaluator_of(tmp_path, items(), {}), Asked(plain))
    function = {"name": "get_time", "parameters": {"properties": {"zone": {"type": "string"}}}}
    asked = Item(prompt="May I use get_time?", tools=({"type": "function", "function": function},))
    with pytest.raises(MergetuneError, match=r"leaves out `get_time`"):
        contexts(evaluator_of(tmp_path, [asked, asked], {}), Asked(plain))


def test_arguments_reach_the_template_and_wrong_names_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    quiet = evaluator_of(tmp_path, items(), {}, template_arguments={"enable_thinking": False})
    assert contexts(quiet, Asked(tokenizer))[0][0].endswith("<think></think>")
    wrong = evaluator_of(tmp_path, items(), {}, template_arguments={"thinking": False})
    with pytest.raises(MergetuneError, match=r"variables of the chat template, but it has no `thinking`"):
        contexts(wrong, Asked(tokenizer))


@pytest.mark.parametrize("scorer", ["exact", "choice"])
@pytest.mark.parametrize("n_shots", [0, 2])
def test_plain_items_are_asked_as_lm_eval_asks_them(
    tmp_path: Path, tokenizer: Any, scorer: str, n_shots: int
) -> None:
    rows = [{"prompt": f"Say {i}.", "answer": f"a{i}", "choices": [f"a{i}", "no"]} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, rows[2:])))
    shots = {"fewshot_items": "shots.jsonl", "num_fewshot": n_shots} if n_shots else {}
    task = {"items": "items.jsonl", "scorer": scorer, "system": "Be brief.", **shots}
    data = {"description": "x", "chat_template": True, "holdout": 0, "objectives": {"o": {"tasks": [task]}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(data))
    evaluator = Evaluator(read_suite(tmp_path / "suite.yaml"))
    prompts = Asked(tokenizer)
    (own,) = evaluator.requests(prompts, evaluator.documents("search")).values()
    (bound,) = evaluator.tasks.values()
    for index, requests in own.items():
        context = bound.task.fewshot_context(
            bound.docs[index],
            num_fewshot=n_shots,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=prompts.apply_chat_template,
        )
        made = bound.task.construct_requests(bound.docs[index], context, apply_chat_template=True)
        assert [each.args for each in requests] == [
            each.args for each in (made if isinstance(made, list) else [made])
        ]


def test_repeats_have_seeds_that_depend_on_the_item_alone(tmp_path: Path, tokenizer: Any) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "repeats": 3}
    settings = []
    for n_items in (2, 3):
        lm = Asked(tokenizer)
        evaluator = evaluator_of(tmp_path, items(n_items), {"sampling": sampling})
        requests = evaluator.requests(lm, evaluator.documents("search"))["o:items.jsonl"]
        settings.append([[each.args[1] for each in own] for own in requests.values()])
    assert settings[0] == settings[1][:2]
    assert {len(own) for own in settings[1]} == {3}
    assert len({each["seed"] for own in settings[1] for each in own}) == 9
    assert {(each["temperature"], each["top_p"], each["do_sample"]) for each in settings[0][0]} == {
        (0.7, 0.9, True)
    }


def test_draws_are_shared_by_tasks_that_score_the_same_items_otherwise(
    tmp_path: Path, tokenizer: Any
) -> None:
    answer = [{"name": "get_time", "arguments": {}}]
    rows = [
        {"messages": [{"role": "user", "content": f"Hi, {i}."}], "tools": list(TOOLS), "answer": answer}
        for i in range(2)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"items": "items.jsonl", "sampling": {"temperature": 0.7, "repeats": 3}}
    objectives = {kind: {"tasks": [{**task, "scorer": kind}]} for kind in ("tool_calls", "reply_tokens")}
    data = {"description": "x", "chat_template": True, "holdout": 0, "objectives": objectives}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(data))
    lm = Asked(tokenizer, '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>')
    measured = Evaluator(read_suite(tmp_path / "suite.yaml")).measure(lm, "search")
    assert len(lm.requests) == 2 * 3
    assert measured.scores()["tool_calls"].value == 1.0
    assert measured.scores()["reply_tokens"].value > 1.0


@pytest.mark.parametrize(("count", "expected"), [("mean", 0.75), ("worst", 0.0)])
def test_repeats_are_averaged_or_the_worst_counts(
    tmp_path: Path, tokenizer: Any, count: str, expected: float
) -> None:
    sampling = {"temperature": 1.0, "repeats": 4, "count": count}
    evaluator = evaluator_of(tmp_path, items(), {"sampling": sampling})
    asked = evaluator.requests(Asked(tokenizer), evaluator.documents("search"))["o:items.jsonl"]
    wrong = {own[1].args[1]["seed"] for own in asked.values()}

    def reply(request: Any) -> str:
        return "no" if request.args[1]["seed"] in wrong else "My lord"

    found = evaluator.measure(Asked(tokenizer, reply), "search").items
    assert found["score"].tolist() == [expected] * 2


@pytest.mark.parametrize(
    ("reply", "end", "expected"),
    [
        ("<think>\nHm. </think>\n\nYes.", None, "Yes."),
        ("Hm.</think>Yes.", None, "Yes."),  # where the template begins the thought
        ("<think>Hm, this takes long", None, ""),
        ("Yes.", None, "Yes."),
        ("[THINK]Hm[/THINK]Yes.", None, "Yes."),
        ("<|channel|>analysis<|message|>Hm<|end|><|channel|>final<|message|>Yes.", None, "Yes."),
        ("Hm. ### Yes.", "###", "Yes."),
        ("<think>Hm</think>Yes.", "###", "<think>Hm</think>Yes."),
    ],
)
def test_thoughts_are_taken_off(reply: str, end: str | None, expected: str) -> None:
    assert without_thoughts(reply, end) == expected


@pytest.mark.parametrize(("thinking", "expected"), [("strip", 1.0), ("keep", 0.0)])
def test_what_is_scored_has_no_thoughts(
    tmp_path: Path, tokenizer: Any, thinking: str, expected: float
) -> None:
    evaluator = evaluator_of(tmp_path, items(), {}, thinking=thinking)
    lm = Asked(tokenizer, "<think>Who asks?</think>My lord")
    found = evaluator.measure(lm, "search").items
    assert set(found["score"]) == {expected}
    ask(lm, lm.requests)  # what was said is kept as it was
    assert lm.requests[0].resps == ["<think>Who asks?</think>My lord"]


def test_a_reply_costs_its_tokens_and_fewer_are_better(tmp_path: Path, tokenizer: Any) -> None:
    evaluator = evaluator_of(tmp_path, items(), {"scorer": "reply_tokens"})
    assert evaluator.suite.config.objectives["o"].better == "minimize"
    lm = Asked(tokenizer, "<think>Who asks?</think>My lord")
    found = evaluator.measure(lm, "search").items
    expected = len(tokenizer("<think>Who asks?</think>My lord", add_special_tokens=False)["input_ids"])
    assert found["score"].tolist() == [expected] * 2
    assert "My lord" in found["response"][0]


def test_items_know_their_slices(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}.", "answer": "y", "customer": {"plan": i % 2}} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "x", "answer": "y"}])))
    task = {"items": "items.jsonl", "scorer": "exact"}
    data = {"description": "x", "chat_template": True, "holdout": 0, "slices": ["customer.plan"]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(data | {"objectives": {"o": {"tasks": [task]}}}))
    items = Evaluator(read_suite(tmp_path / "suite.yaml")).items()
    assert [json.loads(each) for each in items["slices"]] == [
        *({"customer.plan": str(i % 2)} for i in range(4)),
        {},
    ]
    (zero, one) = slices_of(items, ["customer.plan"])
    assert {zero.name, one.name} == {"customer.plan: 0", "customer.plan: 1"}
    assert len(zero.of(items)) == len(one.of(items)) == 2
