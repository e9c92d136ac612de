"""Suites: every shipped one is sound, broken ones name file and line, splits are stable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Turns
from mergetune.evaluation.suite import read_suite, split_of
from mergetune.files.library import presets


def write_suite(
    folder: Path, lines: list[str], scorer: Any = "exact", chat_template: bool = False, **task: Any
) -> Path:
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    tasks = [{"items": "items.jsonl", "scorer": scorer, **task}]
    suite = {"description": "test", "chat_template": chat_template, "objectives": {"skill": {"tasks": tasks}}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


@pytest.mark.parametrize("path", presets("evals").values(), ids=lambda path: path.stem)
def test_every_preset_is_sound(path: Path) -> None:
    suite = read_suite(path)
    assert len(suite.config.description) > 30
    assert suite.config.scores


def test_items_are_read_in_order_with_extra_keys_allowed(tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "prompt": f"p{i}", "answer": str(i)}) for i in range(3)]
    suite = read_suite(write_suite(tmp_path, [lines[0], "", *lines[1:]]))
    assert [item.prompt for item in suite.items["items.jsonl"]] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    ("line", "scorer", "message"),
    [
        ('{"prompt": "x", "answer": ', "exact", r"items\.jsonl, line 2: is not JSON"),
        (
            '{"question": "x", "answer": "y"}',
            "exact",
            "line 2: must be as the first rows are, prompts with answers .* but has `question`, `answer`",
        ),
        (
            '{"messages": []}',
            "exact",
            "line 2: must be as the first rows are, .* but has `messages`",
        ),
        ("{}", "exact", "line 2: must be as the first rows are, .* but is empty"),
        ('["x"]', "exact", r'items\.jsonl, line 2: must be one JSON object.*but is \["x"\]'),
        ('{"prompt": 3, "answer": "y"}', "exact", "line 2: `prompt`: must be text, but got 3"),
        ('{"prompt": "", "answer": "y"}', "exact", "line 2: `prompt`: must not be empty where there are no"),
        (
            '{"prompt": "", "choices": ["y"], "answer": "y"}',
            "exact",
            "line 2: the scorer `exact` needs a prompt",
        ),
        ('{"prompt": "x"}', "json", r"items\.jsonl, line 2: the scorer `json` needs `answer`"),
        ('{"prompt": "x", "choices": ["a"], "answer": 0}', "choice", "line 2: the scorer `choice` needs two"),
        ('{"prompt": "x", "answer": ""}', "contains", "line 2: `answer` must not be empty"),
        ('{"prompt": "x", "answer": []}', "contains", "line 2: `answer` must not be empty"),
        (
            '{"prompt": "x", "choices": ["a", "b"], "answer": 2}',
            "choice",
            "line 2: the scorer `choice` needs `answer`",
        ),
        ('{"prompt": "x"}', {"kind": "regex"}, "line 2: the scorer `regex` needs `patterns`"),
        (
            '{"prompt": "x", "patterns": ["("]}',
            {"kind": "regex"},
            r"line 2: `patterns\.0`.*regular expression",
        ),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, scorer: Any, message: str) -> None:
    good = {"prompt": "x", "answer": 0, "choices": ["a", "b"]}
    if isinstance(scorer, dict):
        good["patterns"] = ["x"]
    with pytest.raises(MergetuneError, match=message):
        read_suite(write_suite(tmp_path, [json.dumps(good), line], scorer))


def test_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    prompt = "one\u2028two\x85three"
    line = json.dumps({"prompt": prompt, "answer": "x"}, ensure_ascii=False)
    assert read_suite(write_suite(tmp_path, [line])).items["items.jsonl"][0].prompt == prompt


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = write_suite(tmp_path, ["", ""])
    with pytest.raises(MergetuneError, match="holds no items"):
        read_suite(path)
    (tmp_path / "items.jsonl").unlink()
    with pytest.raises(MergetuneError, match=r"items\.jsonl: cannot be read"):
        read_suite(path)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metric": "acc"}, "`metric` does not go with `items`"),
        ({"lm_eval": "arc_easy"}, "either `items`"),
        ({"num_fewshot": 2}, "needs `fewshot_items`"),
        (
            {"max_tokens": 5},
            r"`objectives\.skill\.tasks\.0\.max_tokens`: unknown key. Did you mean `max_new_tokens`",
        ),
    ],
)
def test_a_task_that_cannot_be_meant_is_refused(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    with pytest.raises(MergetuneError, match=message):
        read_suite(write_suite(tmp_path, ["{}"], **task))


def test_a_suite_without_objectives_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("description: x\nchat_template: false\nobjectives: {}\n")
    with pytest.raises(MergetuneError, match="`objectives`: must name at least one objective, but is empty"):
        read_suite(path)


def test_guards_and_lists_may_be_left_empty(tmp_path: Path) -> None:
    path = write_suite(tmp_path, ['{"prompt": "x", "answer": "y", "choices": null}'], stop=None)
    path.write_text(f"{path.read_text()}\nguards:\n")
    suite = read_suite(path)
    assert suite.config.guards == {}
    assert suite.items["items.jsonl"][0].choices == ()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"scorer": "exakt"},
            r"`objectives\.skill\.tasks\.0\.scorer`: must be 'exact', .*'exakt'\. Did you mean `exact`\?",
        ),
        (
            {"scorer": {"kind": "tool_call", "part": "name"}},
            r"`objectives\.skill\.tasks\.0\.scorer\.kind`: must be .*\. Did you mean `tool_calls`\?",
        ),
        (
            {"scorer": {"kind": "tool_calls", "part": "nam"}},
            r"`objectives\.skill\.tasks\.0\.scorer\.part`: must be .*'nam'\. Did you mean `name`\?",
        ),
        (
            {"scorer": {"kind": "tool_calls", "prt": "name"}},
            r"`objectives\.skill\.tasks\.0\.scorer\.prt`: unknown key\. Did you mean `part`\?",
        ),
        ({"max_tokens": 5}, r"`objectives\.skill\.tasks\.0\.max_tokens`: unknown key\..*"),
        ({"scorer": {"kind": "exact", "patterns": ["x"]}}, ".*`patterns` belongs to the scorer `regex`.*"),
    ],
)
def test_a_mistake_in_a_task_is_one_line(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    path = write_suite(tmp_path, ['{"prompt": "x", "answer": "y"}'], **task)
    with pytest.raises(MergetuneError) as caught:
        read_suite(path)
    assert re.fullmatch(f"{re.escape(str(path))}: {message}", str(caught.value))


def test_one_file_may_be_read_in_two_ways(tmp_path: Path) -> None:
    path = write_suite(tmp_path, ['{"prompt": "x", "answer": "1", "other": "2"}'] * 8)
    suite = yaml.safe_load(path.read_text())
    task = suite["objectives"]["skill"]["tasks"][0]
    suite["objectives"]["skill"]["tasks"].append({**task, "fields": {"answer": "other"}})
    path.write_text(yaml.safe_dump(suite | {"holdout": 0}))
    found = read_suite(path)
    assert {name: items[0].answer for name, items in found.items.items()} == {
        "items.jsonl": "1",
        "items.jsonl (answer: other)": "2",
    }
    assert found.read_as["items.jsonl"] == "items.jsonl: 8 items, taken for prompts with answers"
    targets = {name: task.target(0) for name, task in Evaluator(found).tasks.items()}
    assert targets == {"skill:items.jsonl": "1", "skill:items.jsonl (answer: other)": "2"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"items": "hf:owner/name"}, "hf:owner/name: a data set on the Hub needs `split`"),
        ({"split": "test"}, "`split` belongs to data sets, but this is a file"),
        ({"config_name": "main"}, "`config_name` belongs to data sets on the Hub"),
        ({"score_turns": "all"}, "taken for prompts with answers. `score_turns: all` needs conversations"),
        ({"score_turns": "some"}, "tasks.0.score_turns`: must be 'last', 'all', 'text' or 'calls'"),
        ({"answers": False}, "`objectives.skill.tasks.0.answers`: must be text"),
    ],
)
def test_options_of_files_are_checked(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    with pytest.raises(MergetuneError, match=message):
        read_suite(write_suite(tmp_path, ['{"prompt": "x", "answer": "y"}'], **task))


def test_all_turns_of_conversations_may_be_scored(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    path = write_suite(tmp_path, [json.dumps({"messages": turns})], score_turns="all")
    assert read_suite(path).config.objectives["skill"].tasks[0].score_turns == "all"


def test_turns_must_be_those_that_the_scorer_takes(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "The time?"},
        {"role": "assistant", "content": "One moment."},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    row = [json.dumps({"messages": turns, "tools": tools})]
    with pytest.raises(MergetuneError, match=r"line 1, turn 2 of 2: .*`score_turns: text` leaves such"):
        read_suite(write_suite(tmp_path, row, chat_template=True, score_turns="all"))
    cases: list[tuple[str, Turns, int]] = [
        ("exact", "text", 1),
        ("tool_calls", "calls", 1),
        ("tool_calls", "all", 2),
    ]
    for scorer, which, n_turns in cases:
        suite = read_suite(write_suite(tmp_path, row, chat_template=True, scorer=scorer, score_turns=which))
        assert len(suite.items["items.jsonl"][0].turns(which)) == n_turns
    without = [json.dumps({"messages": turns[:2]})]
    with pytest.raises(MergetuneError, match=r"line 1: must have a reply of the kind `score_turns: calls`"):
        read_suite(write_suite(tmp_path, without, scorer="tool_calls", score_turns="calls"))


def test_tools_and_conversations_need_a_chat_template(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"properties": {"zone": {}}}}}
    plain = {"prompt": "Is it late now?", "answer": "y", "tools": [tool]}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2
    for row, what in ((plain, "the tool `now`"), ({"messages": turns}, "3 messages")):
        with pytest.raises(MergetuneError, match=f"line 1: .* the prompt alone, but the item has {what}"):
            read_suite(write_suite(tmp_path, [json.dumps(row)]))
    described = {**plain, "prompt": "You may call now(zone). Is it late?"}
    assert read_suite(write_suite(tmp_path, [json.dumps(described)]))


def test_slices_are_keys_of_metadata(tmp_path: Path) -> None:
    path = write_suite(
        tmp_path, ['{"prompt": "x", "answer": "y", "lang": "en", "customer": {"plan": "pro"}}']
    )
    text = path.read_text()
    path.write_text(f"{text}\nslices: [lang, customer.plan]\n")
    assert read_suite(path).config.slices == ("lang", "customer.plan")
    path.write_text(f"{text}\nslices: [language]\n")
    with pytest.raises(MergetuneError, match=r"`slices`: .* no item has `language`. Did you mean `lang`"):
        read_suite(path)


def test_bfcl_without_its_answers_is_told_where_they_are(tmp_path: Path) -> None:
    question = {"id": "a", "question": [[{"role": "user", "content": "x"}]], "function": [{"name": "f"}]}
    with pytest.raises(
        MergetuneError, match=r"needs `answer`.* say `answers: FILE`; or `answers: none` for no call"
    ):
        read_suite(write_suite(tmp_path, [json.dumps(question)]))


def test_the_digest_follows_the_items(tmp_path: Path) -> None:
    one = read_suite(write_suite(tmp_path, ['{"prompt": "x", "answer": "1"}'])).digest
    assert one == read_suite(write_suite(tmp_path, ['{"answer": "1", "prompt": "x"}'])).digest
    assert one != read_suite(write_suite(tmp_path, ['{"prompt": "x", "answer": "2"}'])).digest


def test_the_split_depends_on_the_content_alone_and_keeps_its_share() -> None:
    splits = [split_of(f"item {i}", 0.3) for i in range(2000)]
    assert splits == [split_of(f"item {i}", 0.3) for i in range(2000)]
    assert splits.count("holdout") / 2000 == pytest.approx(0.3, abs=0.04)
    assert {split_of(f"item {i}", 0.0) for i in range(100)} == {"search"}
