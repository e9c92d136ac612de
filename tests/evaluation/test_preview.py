"""Previews show an item as the model will see it, and what its reply is scored against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers import mergetune
from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item, Message, ToolCall
from mergetune.evaluation.preview import preview, scorer_of

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"city": {}, "day": {}}}},
}
CALL = Message(role="assistant", tool_calls=(ToolCall(name="weather", arguments={"city": "Oslo"}),))
ITEM = Item(
    prompt="Weather?",
    system="Be brief.",
    messages=(Message(role="user", content="Weather?"), CALL, Message(role="tool", content="4 °C")),
    tools=(TOOL,),
    target=Message(role="assistant", content="4 °C"),
    answer="4 °C",
)


def test_messages_are_shown_by_their_roles() -> None:
    assert preview(ITEM).splitlines() == [
        "[tools] weather(city, day)",
        "[system] Be brief.",
        "[user] Weather?",
        '[assistant] {"name": "weather", "arguments": {"city": "Oslo"}}',
        "[tool] 4 °C",
        "--- what is wanted",
        "[assistant] 4 °C",
    ]


@pytest.mark.parametrize(
    ("changes", "kind", "wanted"),
    [
        (
            {"target": CALL, "answer": CALL.wanted},
            None,
            ['[assistant] {"name": "weather", "arguments": {"city": "Oslo"}}'],
        ),
        ({"target": None, "answer": [{"f": {"a": [1]}}]}, None, ['[{"f": {"a": [1]}}]']),
        ({"target": None, "answer": None}, None, ["nothing: there is no answer"]),
        ({"target": None, "choices": ("a", "b"), "answer": 1}, None, ['choices: ["a", "b"]', "1"]),
        ({"target": None, "choices": ("a", "b"), "answer": 1}, "choice", ["b"]),
        ({"answer": ["x", "y"]}, "contains", ["x, y"]),
    ],
)
def test_what_is_wanted_is_shown(changes: dict[str, Any], kind: str | None, wanted: list[str]) -> None:
    scorer = None if kind is None else scorer_of(kind)
    lines = preview(ITEM.model_copy(update=changes), scorer).splitlines()
    assert lines[lines.index("--- what is wanted") + 1 :] == wanted


def test_patterns_are_shown_where_no_scorer_says_what_is_wanted() -> None:
    lines = preview(Item(prompt="Hi", patterns=("!$", "^[A-Z]"))).splitlines()
    assert lines[-1] == 'patterns: ["!$", "^[A-Z]"]'


def test_the_chat_template_is_applied(tiny_base: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base)
    plain = Item(prompt="Hi", answer="Hello", system="Be brief.")
    assert preview(plain, tokenizer=tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "\n--- what is wanted\nHello"
    )
    with pytest.raises(
        MergetuneError, match="the chat template must write every tool, but leaves out `weather`"
    ):
        preview(plain.model_copy(update={"tools": (TOOL,)}), tokenizer=tokenizer)


def test_the_command_says_what_a_file_was_taken_for(tmp_path: Path, tiny_base: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"{n}?", "gold": {"text": "a"}}) for n in range(5)))
    known = ("--fields", "prompt=question", "--fields", "answer=gold.text")
    done = mergetune("items", file, *known, "--model", tiny_base, "--scorer", "exact")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"{file}: 5 items, taken for prompts with answers by `fields` (prompt, answer)\n"
    )
    assert done.stdout.count("--- what is wanted\na\n") == 3
    assert "=== " + f"{file}, line 3\n<|im_start|>user\n2?<|im_end|>" in done.stdout
    for wrong, message in (
        ((), "Say in the task where an item's fields stand, such as `fields: {prompt: question"),
        (("--fields", "prompt"), "--fields must be FIELD=PATH, such as answer=gold.text, but is prompt"),
        (("--fields", "promt=question"), "`promt`: unknown key. Did you mean `prompt`"),
        (("--fields", "prompt=question", "--scorer", "exact"), "line 1: the scorer `exact` needs `answer`"),
        ((*known, "--scorer", "exakt"), "`scorer`: must be 'exact', "),
    ):
        done = mergetune("items", file, *wrong)
        assert (done.returncode, done.stdout) == (3, "")
        assert message in done.stderr


def test_the_command_leaves_out_rows_and_takes_a_template_as_a_suite_does(
    tmp_path: Path, tiny_base: Path
) -> None:
    file, template = tmp_path / "items.jsonl", tmp_path / "own.jinja"
    file.write_text("\n".join(json.dumps({"prompt": f"{n}?", "answer": "a" * n}) for n in range(5)))
    template.write_text("{% for each in messages %}{{ each.role }} says {{ each.content }}\n{% endfor %}")
    written = ("--model", tiny_base, "--chat-template", template)
    skipped = ("--skip", 1, "--skip", 3)
    done = mergetune("items", file, *written, *skipped, "--scorer", "contains")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{file}: 3 items")
    assert [line for line in done.stdout.splitlines() if " says " in line] == [
        f"user says {n}?" for n in (1, 3, 4)
    ]
    for wrong, message in (
        (("--scorer", "contains"), "line 1: `answer` must not be empty"),
        (("--skip", 9), "`skip` must name rows that are there, but 9 is none of 5"),
        (written[2:], "own.jinja takes the place of a model's, but no model is named"),
        ((*written[:3], tmp_path / "none.jinja"), "none.jinja: cannot be read"),
    ):
        done = mergetune("items", file, *wrong)
        assert (done.returncode, done.stdout) == (3, "")
        assert message in done.stderr
