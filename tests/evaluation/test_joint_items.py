"""Joint items need two skills at once: the right call under a persona's system message, then its voice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from helpers import HERMES, build_llama, mergetune
from mergetune import join_items, read_items
from mergetune.engines.completions import TokenizerPrompts
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
CITIES = ("Oslo", "Rome", "Paris", "Kyiv", "Lima", "Bonn", "Cork", "Bath")


def persona_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {"prompt": "Hello?", "system": f"You are pirate {number}.", "patterns": ["(?i)ahoy", str(number)]}
    return {**row, "id": f"p{number}", **changes}


def called(city: str, *after: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a conversation in which the weather of a city is asked for, and the tool is called."""
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": f"id-{city}", "function": function}]}
    asked = {"role": "user", "content": f"Weather in {city}?"}
    return {"messages": [asked, call, *after], "tools": TOOLS, "country": city[0], **fields}


def answered(city: str) -> dict[str, Any]:
    """Return a conversation that goes on after the call."""
    result = {"role": "tool", "tool_call_id": f"id-{city}", "content": "4 °C"}
    return called(city, result, {"role": "assistant", "content": "It is 4 °C."})


TOOL_ROWS = [answered(city) if city < "M" else called(city) for city in CITIES]


def files(folder: Path, persona: Any = None, tools: Any = None) -> tuple[Path, Path]:
    rows = {"persona": persona or [persona_row(n) for n in range(3)], "tools": tools or TOOL_ROWS}
    for name, own in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    return folder / "persona.jsonl", folder / "tools.jsonl"


def joined(folder: Path, persona: Any = None, tools: Any = None, **options: Any) -> Any:
    first, second = map(read_items, files(folder, persona, tools))
    return join_items(first, second, folder / "joint.yaml", **options)


def test_every_request_is_asked_once_and_every_persona_equally_often(tmp_path: Path) -> None:
    found = joined(tmp_path)
    assert [row["request"]["item"] for row in found.calls] == list(range(1, 9))
    used = Counter(row["persona"]["id"] for row in found.calls)
    assert sorted(used.values()) == [2, 3, 3]
    for call, reply in zip(found.calls, found.replies, strict=True):
        assert reply["messages"][: len(call["messages"])] == call["messages"]
        assert (call["persona"], call["request"]) == (reply["persona"], reply["request"])
    assert found.summary == "8 calls and 8 replies; 3 results are made of the call"


def test_the_seed_alone_decides_who_is_paired(tmp_path: Path) -> None:
    rows = []
    for place, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(place)
        folder.mkdir()
        rows.append(joined(folder, seed=seed, limit=5).calls)
    assert rows[0] == rows[1] != rows[2]
    assert {len(each) for each in rows} == {5}
    assert all(Counter(row["persona"]["id"] for row in each).most_common(1)[0][1] == 2 for each in rows)


def test_both_turns_are_read_back_as_they_were_made(tmp_path: Path) -> None:
    joined(tmp_path, limit=8)
    calls, replies = (read_items(tmp_path / f"joint_{turn}.jsonl") for turn in ("calls", "replies"))
    assert calls.form == "OpenAI chat with tools"
    for city, call, reply in zip(CITIES, calls.items, replies.items, strict=True):
        assert call.system == reply.system == f"You are pirate {call.metadata['persona']['id'][1]}."
        assert call.prompt == reply.prompt == f"Weather in {city}?"
        assert list(call.tools) == list(reply.tools) == TOOLS
        assert call.answer == [{"name": "weather", "arguments": {"city": city}}]
        assert [message.role for message in call.messages] == ["user"]
        asked, made, result = reply.messages
        assert (asked, made.wanted) == (call.messages[0], call.answer)
        assert result.tool_call_id == made.tool_calls[0].id == f"id-{city}"
        expected = "4 °C" if city < "M" else json.dumps({"status": "ok", "city": city})
        assert result.content == expected
        assert reply.metadata["result_from"] == ("data" if city < "M" else "call")
        assert (reply.answer, reply.target) == ([], None)
        assert reply.metadata["request"]["country"] == city[0]


def test_accepted_values_stay_the_answer_and_the_first_of_them_is_called(tmp_path: Path) -> None:
    answer = [{"weather": {"city": ["Oslo", "Oslo, Norway"]}}]
    row = {"system": "It is Monday.", "tools": TOOLS, "answer": answer}
    found = joined(tmp_path, tools=[{**row, "prompt": f"Weather, {n}?"} for n in range(2)])
    (call, _), (reply, _) = found.calls, found.replies
    assert call["answer"] == answer
    _, _, made, result = reply["messages"]
    assert made["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert len(made["tool_calls"][0]["id"]) == 9  # as Mistral's chat templates take it
    assert result["tool_call_id"] == made["tool_calls"][0]["id"]
    assert call["messages"][0]["content"].startswith("You are pirate ")
    assert call["messages"][0]["content"].endswith(".\n\nIt is Monday.")


def test_the_last_call_of_a_conversation_counts_with_all_its_results(tmp_path: Path) -> None:
    row = answered("Oslo")
    function = {"name": "weather", "arguments": {"city": "Rome"}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}] * 2}
    row["messages"] += [{"role": "user", "content": "And Rome?"}, call, {"role": "tool", "content": "1"}]
    row["messages"] += [{"role": "tool", "content": "2"}, {"role": "user", "content": "Thanks"}]
    row["messages"] += [{"role": "assistant", "content": "Bye."}]
    found = joined(tmp_path, tools=[row, TOOL_ROWS[1]])
    assert [message["content"] for message in found.calls[0]["messages"]][-1] == "And Rome?"
    assert len(found.calls[0]["answer"]) == 2
    assert [message["role"] for message in found.replies[0]["messages"]][-3:] == ["assistant", "tool", "tool"]


@pytest.mark.parametrize("n_requests", [6, 40])
def test_all_items_of_a_request_are_in_one_split(tmp_path: Path, n_requests: int) -> None:
    requests = [called(f"city {n % n_requests}", country=n) for n in range(7 * n_requests)]
    found = joined(tmp_path, [persona_row(n) for n in range(9)], requests)
    splits: dict[str, set[str]] = {}
    tasks = Evaluator(read_suite(tmp_path / "joint.yaml")).tasks
    for bound in tasks.values():
        for index, split in enumerate(bound.splits):
            splits.setdefault(bound.prompt(index), set()).add(str(split))
    assert len(tasks) == 4
    assert len(splits) == n_requests
    assert all(len(each) == 1 for each in splits.values())
    assert set().union(*splits.values()) == {"search", "holdout"}
    assert (len(found.calls), found.n_left_out) == (2 * n_requests, 5 * n_requests)


class Replies(TokenizerPrompts):
    """What replies by a function of the prompt."""

    def __init__(self, tokenizer: Any, reply: Any) -> None:
        super().__init__(tokenizer)
        self.reply, self.n_asked = reply, 0

    def generate_until(self, requests: Any) -> list[str]:
        self.n_asked += len(requests)
        return [self.reply(request.args[0]) for request in requests]


def call_of(prompt: str) -> str:
    city = prompt.partition("Weather in ")[2].partition("?")[0]
    return f'<tool_call>{{"name": "weather", "arguments": {{"city": "{city}"}}}}</tool_call>'


def voice_of(prompt: str) -> str:
    return f"Ahoy, {prompt.partition('You are pirate ')[2][0]}!"


def both(prompt: str) -> str:
    is_after = "<tool_response>" in prompt
    return voice_of(prompt) if is_after else voice_of(prompt) + call_of(prompt)


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        (both, (1, 1, 1)),
        (call_of, (0.5, 0, 0)),
        (voice_of, (0.5, 1, 1)),
        (lambda prompt: voice_of(prompt) + call_of(prompt), (0.5, 1, 1)),
        (lambda _: "No.", (0.5, 0, 0)),
    ],
)
def test_each_turn_is_scored_by_both_scorers(
    tmp_path: Path, tiny_base: Path, reply: Any, scores: tuple[float, ...]
) -> None:
    joined(tmp_path, system="")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = HERMES
    lm, evaluator = Replies(tokenizer, reply), Evaluator(read_suite(tmp_path / "joint.yaml"))
    found = evaluator.measure_documents(lm, evaluator.documents("all")).scores()
    names = ("joint_calls", "joint_voice", "joint_voice_beside_calls")
    assert {name: score.value for name, score in found.items()} == dict(zip(names, scores, strict=True))
    assert lm.n_asked == 2 * len(CITIES)  # both scorers look at one reply


@pytest.mark.parametrize(
    ("persona", "scorer", "is_beside", "voice"),
    [
        ({"patterns": ["^Ahoy"]}, "regex", True, {"answer": None, "patterns": ["^Ahoy"]}),
        ({"patterns": [r"\?\Z"]}, "regex", False, {"answer": None, "patterns": [r"\?\Z"]}),
        ({"patterns": []}, {"kind": "regex", "patterns": ["arr$"]}, False, {"answer": None, "patterns": []}),
        ({"patterns": [], "answer": "ahoy"}, "contains", True, {"answer": "ahoy", "patterns": []}),
        ({"patterns": ["a"], "answer": "Hi!"}, "regex", True, {"answer": None, "patterns": ["a"]}),
        ({"patterns": [], "answer": "Hi!"}, "similarity", False, {"answer": "Hi!", "patterns": []}),
    ],
)
def test_what_the_persona_is_scored_by_is_what_its_scorer_reads(
    tmp_path: Path, persona: dict[str, Any], scorer: Any, is_beside: bool, voice: dict[str, Any]
) -> None:
    found = joined(tmp_path, [persona_row(1, **persona)], scorer=scorer)
    assert all(row["voice"] == voice for row in (*found.calls, *found.replies))
    suite = yaml.safe_load((tmp_path / "joint.yaml").read_text())
    assert ("joint_voice_beside_calls" in suite["objectives"]) == is_beside
    (task,) = suite["objectives"]["joint_voice"]["tasks"]
    assert task["scorer"] == scorer


def test_a_judge_sees_no_reply_to_another_request(tmp_path: Path) -> None:
    (tmp_path / "tone.md").write_text("5: a pirate. 1: anyone else.")
    judge = {"kind": "judge", "model": "m", "url": "http://localhost", "rubric": "tone.md"}
    joined(tmp_path, [persona_row(1, patterns=None, answer="Ahoy, and good morning!")], scorer=judge)
    suite = read_suite(tmp_path / "joint.yaml")
    by_voice = [items for name, items in suite.items.items() if "voice" in name]
    assert len(by_voice) == 2
    assert all(item.answer is None for items in by_voice for item in items)


@pytest.mark.parametrize(
    ("persona", "tools", "options", "message"),
    [
        ({"system": None}, None, {}, "line 1: a persona needs a system message, but the item has none"),
        ({"patterns": None, "answer": "x"}, None, {}, "the scorer `regex` needs `patterns`"),
        ({}, None, {"scorer": "choice"}, "must know a voice by a reply's text, but is `choice`"),
        ({}, None, {"scorer": "tool_calls"}, "must know a voice by a reply's text, but is `tool_calls`"),
        ({}, None, {"scorer": "rexeg"}, "`scorer`: must be 'exact', "),
        ({}, {"answer": []}, {}, "8 items, taken for .* but none of these does"),
        ({}, {"answer": "Sunny."}, {}, "Joint items need items that call a tool, but none of these does"),
        ({}, {"answer": None}, {}, "the scorer `tool_calls` needs `answer`"),
        ({}, {"answer": [{"name": "rain", "arguments": {}}]}, {}, "calls `rain`, which is not among `tools`"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    tmp_path: Path, persona: dict[str, Any], tools: Any, options: dict[str, Any], message: str
) -> None:
    rows = None if tools is None else [{"prompt": f"{city}?", "tools": TOOLS, **tools} for city in CITIES]
    with pytest.raises(MergetuneError, match=message):
        joined(tmp_path, [persona_row(1, **persona)], rows, **options)
    assert not list(tmp_path.glob("joint*"))


def test_a_call_in_the_midst_needs_tools(tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match=r"line 1: .* needs tools that may be called"):
        joined(tmp_path, tools=[{**answered("Oslo"), "tools": None}])


def test_no_suite_is_overwritten_and_none_is_left_that_cannot_be_read(tmp_path: Path) -> None:
    wrong = {"kind": "judge", "model": "m", "url": "http://localhost", "rubric": "tone.md"}
    with pytest.raises(MergetuneError, match=r"tone\.md: cannot be read"):
        joined(tmp_path, [persona_row(1, patterns=None)], scorer=wrong)
    joined(tmp_path)
    with pytest.raises(MergetuneError, match=r"must be a new file that ends in \.yaml, but is there already"):
        joined(tmp_path)


def test_the_suite_of_the_command_is_evaluated_as_it_is(tmp_path: Path) -> None:
    model = build_llama(tmp_path / "model", max_position_embeddings=2048)
    (model / "chat_template.jinja").write_text(HERMES)
    options = json.loads((model / "tokenizer_config.json").read_text()) | {"model_max_length": 2048}
    (model / "tokenizer_config.json").write_text(json.dumps(options))
    out = tmp_path / "new" / "mine.yaml"
    done = mergetune("join", *files(tmp_path), "--out", out, "--scorer", "{kind: regex, ignore_case: true}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == [
        "8 calls and 8 replies; 3 results are made of the call",
        f"Suite: {out}",
    ]
    done = mergetune("eval", model, "--suite", out, "--engine", "transformers", "--json", "--cache", tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert {name: score["n_items"] for name, score in scores.items()} == {
        "mine_calls": 16,
        "mine_voice": 8,
        "mine_voice_beside_calls": 8,
    }
    done = mergetune("join", *files(tmp_path), "--out", tmp_path / "x.yaml", "--scorer", "{kind: regex")
    assert done.returncode == 3
    assert done.stderr.startswith("error: --scorer: is not valid YAML")
