"""Files of items: every kind of file is read alike, and what is no such file is called what it is."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from helpers import mergetune
from mergetune.errors import MergetuneError
from mergetune.evaluation.fields import FieldMap
from mergetune.evaluation.item_files import ItemSource, read_items
from mergetune.evaluation.items import Item
from mergetune.evaluation.suite import read_suite

GOOD = {"prompt": "Say hi", "answer": "hi"}
LINE = json.dumps(GOOD) + "\n"
MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = {"messages": [*MESSAGES, {"role": "assistant", "content": "Hello"}], "lang": "en"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def write_suite(folder: Path, content: bytes, scorer: str = "exact", **suite: Any) -> Path:
    (folder / "items").write_bytes(content)
    tasks = [{"items": "items", "scorer": scorer}]
    data = {"description": "test", "chat_template": False, "objectives": {"skill": {"tasks": tasks}}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(data | suite))
    return folder / "suite.yaml"


def items(folder: Path, content: bytes) -> tuple[Item, ...]:
    return read_suite(write_suite(folder, content)).items["items"]


def read(folder: Path, file: str, **options: Any) -> tuple[Item, ...]:
    return read_items(ItemSource(file, **options), folder).items


@pytest.mark.parametrize(
    "content",
    [
        (2 * LINE).encode(),
        (2 * LINE).encode("utf-8-sig"),
        (2 * LINE).replace("\n", "\r\n").encode("utf-8-sig"),
        (2 * LINE).encode("utf-16"),
        (2 * LINE).replace("\n", "\r\n").encode("utf-16"),
        b"\xfe\xff" + (2 * LINE).encode("utf-16-be"),
        json.dumps([GOOD, GOOD]).encode(),
        json.dumps([GOOD, GOOD], indent=2).encode("utf-8-sig"),
        f"\n[{LINE},{LINE}]\n\n".encode(),
    ],
    ids=["lines", "mark", "CRLF", "UTF-16", "UTF-16 CRLF", "UTF-16 BE", "array", "over lines", "with lines"],
)
def test_lines_and_an_array_are_read(tmp_path: Path, content: bytes) -> None:
    assert items(tmp_path, content) == (Item(prompt="Say hi", answer="hi"),) * 2


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_of_text_stays_text(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [("007", "a, b; c\td|e"), ("1e3", 'say "hi"'), ("NA", "two\nlines"), ("TRUE", " x ")]
    table = pd.DataFrame(rows, columns=["answer", "prompt"]).assign(topic="ä", empty="")
    table.to_csv(tmp_path / "items.csv", sep=delimiter, encoding=encoding, index=False)
    found = read(tmp_path, "items.csv")
    assert [(item.answer, item.prompt, item.metadata) for item in found] == [
        (answer, prompt, {"topic": "ä"}) for answer, prompt in rows
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "prompt,answer\na,b\n\na,b,c\n",
            "row 4: must have a cell for each of the columns prompt, answer, but has 3",
        ),
        ("prompt,answer\na\n", r"row 2: must have a cell for each"),
        ('prompt,answer\na,b\n"a,b\n', "row 3: is no row of a CSV file: unexpected end of data"),
        ('prompt,answer\n"a"b,c\n', "row 2: is no row of a CSV file"),
        ("prompt,prompt\na,b\n", "row 1: the first row of a CSV file must name each column"),
        ("prompt,answer\na,b\n,b\n", r"row 3: must be as the first rows are, .* but has `answer`"),
        (
            "question,gold\na,b\n",
            r"row 2: must be of a form that is read.*fields: {prompt: question, answer: PATH}",
        ),
        ("prompt,answer\n", "holds no items"),
        ("", "holds no items"),
    ],
)
def test_a_broken_row_of_a_table_is_named_as_spreadsheets_count(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "items.csv").write_text(content)
    with pytest.raises(MergetuneError, match=rf"items\.csv(, |: ){message}"):
        read(tmp_path, "items.csv")


def test_a_cell_may_hold_a_conversation_as_json(tmp_path: Path) -> None:
    row = {
        "messages": json.dumps(CHAT["messages"]),
        "tools": json.dumps([{"name": "f"}]),
        "note": "x" * 200_000,
    }
    pd.DataFrame([row]).to_csv(tmp_path / "items.csv", index=False)
    (item,) = read(tmp_path, "items.csv")
    assert (item.prompt, item.answer, len(item.tools)) == ("Hi", "Hello", 1)


def test_parquet_and_data_sets_are_read_as_lines_are(tmp_path: Path) -> None:
    """Arrow gives every object the keys of all; what a row did not have is not there after reading."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"days": [1, 2]}}}
    rows = [
        {
            "messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [each]}],
            "tools": [tool],
        }
        for each, tool in (
            (
                call,
                {"name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
            ),
            (
                other,
                {"name": "g", "parameters": {"type": "object", "properties": {"days": {"type": "array"}}}},
            ),
        )
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = read(tmp_path, "items.jsonl")
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "items.parquet")
    data.save_to_disk(tmp_path / "alone")
    DatasetDict({"train": data.select([0]), "test": data}).save_to_disk(tmp_path / "both")
    assert read(tmp_path, "items.parquet") == expected
    assert read(tmp_path, "alone") == expected
    assert read(tmp_path, "both", split="test") == expected
    with pytest.raises(MergetuneError, match=r"both: has the splits train, test. Name one"):
        read(tmp_path, "both")
    with pytest.raises(MergetuneError, match=r"has no split `tset`. Did you mean `test`"):
        read(tmp_path, "both", split="tset")
    with pytest.raises(MergetuneError, match=r"without splits. Leave `split: test` out"):
        read(tmp_path, "alone", split="test")


def test_typed_cells_become_what_json_has(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "prompt": ["a", "b"],
            "answer": [0.5, float("nan")],
            "when": [pd.Timestamp("2024-05-01"), pd.NaT],
            "raw": [b"x", b"y"],
        }
    )
    frame.to_parquet(tmp_path / "items.parquet")
    first, second = read(tmp_path, "items.parquet")
    assert (first.answer, first.metadata) == (0.5, {"when": "2024-05-01T00:00:00"})
    assert (second.answer, second.metadata) == (None, None)


def test_a_data_set_on_the_hub_is_read_from_its_cache_or_named(tmp_path: Path) -> None:
    """In a process of its own: whether the Hub is asked is settled when the library is imported."""
    program = (
        "from pathlib import Path; from mergetune.evaluation.item_files import *\n"
        "read_items(ItemSource('hf:nobody/nothing', split='test'), Path())"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert "MergetuneError: hf:nobody/nothing: cannot be loaded: " in done.stderr
    assert "On a machine without the Hub" in done.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"messages": MESSAGES},
            r"must be as the first rows are, prompts with answers .*but has `messages`\.",
        ),
        ({"question": "a", "answer": "b"}, "must be as the first rows are, .* but has `question`, `answer`"),
        ({}, "but is empty"),
        ({"prompt": MESSAGES, "answer": "b"}, "`prompt`: must be text, as in the first rows, but is"),
        ({"prompt": "a", "completion": "b"}, "needs `answer`, but it is missing"),
        ({"prompt": "a", "answer": None}, "needs `answer`, but it is missing or null"),
        ({"prompt": 3, "answer": "b"}, "`prompt`: must be text, but got 3. Put it in quotes"),
        ({"prompt": "a", "answer": "b", "patterns": ["b"]}, "`patterns` belongs to the scorer `regex`"),
        ("x", 'must be one JSON object, .* but is "x"'),
        (["x"], r'must be one JSON object, .* but is \["x"\]'),
        (None, "must be one JSON object, .* but is null"),
    ],
)
def test_a_broken_item_is_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(MergetuneError, match=rf"items, line 2: .*{message}"):
        items(tmp_path, (LINE + json.dumps(values)).encode())
    with pytest.raises(MergetuneError, match=rf"items, item 2: .*{message}"):
        items(tmp_path, json.dumps([GOOD, values]).encode())


def test_half_a_character_is_no_json(tmp_path: Path) -> None:
    for field in ("prompt", "answer", "note"):
        line = json.dumps({**GOOD, field: "\ud83d"})
        with pytest.raises(
            MergetuneError, match=r"line 2: is not JSON: half a character, such as \\ud83d, stands"
        ):
            items(tmp_path, (LINE + line).encode())
    assert items(tmp_path, json.dumps({**GOOD, "prompt": "😀"}).encode())[0].prompt == "😀"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"prompt,answer\nSay hi,hi\n",
            r"line 1: is not JSON: .*A table .CSV. is read where its name ends in",
        ),
        (
            gzip.compress(LINE.encode(), mtime=0),
            "must be text in UTF-8, but is compressed by gzip. Unpack it",
        ),
        (b"PK\x03\x04 and so on", "is an archive"),
        (b"PAR1 and so on", "must be a Parquet file, but cannot be read"),
        (b"\xff\xfe{\0", "line 1: is not JSON"),
        (b"\xff\xfe{\0\0", "begins as text in UTF-16, but is none"),
        ('{"prompt": "Zoë"}'.encode("latin-1"), "must be text in UTF-8, but is not"),
        (b"\0\0\0", "line 1: is not JSON"),
        (json.dumps(GOOD, indent=2).encode(), "line 1: is not JSON: .* one JSON object over several lines"),
        ((LINE[:-1] + LINE).encode(), "line 1: is not JSON: Extra data"),
        ((LINE + LINE[:-3]).encode(), "line 2: is not JSON"),
        (json.dumps([GOOD, GOOD]).encode()[:-3], "is no JSON array: "),
        (b"[]", "holds no items, but at least one is needed. The items of `skill` are read from it"),
        (b"\n \n", "holds no items"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "line 1: is not JSON: Exceeds the limit"),
        (b"[" * 100_000, "is no JSON array: maximum recursion"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(MergetuneError, match=rf"items(:|,) (?s:.*){message}"):
        items(tmp_path, content)


def test_a_folder_and_a_missing_file_are_no_items(tmp_path: Path) -> None:
    path = write_suite(tmp_path, b"")
    (tmp_path / "items").unlink()
    with pytest.raises(MergetuneError, match=r"items: cannot be read: No such file.*The items of `skill`"):
        read_suite(path)
    (tmp_path / "items").mkdir()
    with pytest.raises(MergetuneError, match="items: is a folder, and must then be a data set"):
        read_suite(path)


def test_what_an_error_quotes_may_be_no_unicode(tmp_path: Path) -> None:
    path = write_suite(tmp_path, b"{}", "\ud83d")
    done = mergetune("eval", tmp_path, "--suite", path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        (
            {"question": "a", "gold": {"text": "b"}},
            {"prompt": "question", "answer": "gold.text"},
            ("a", "b", ()),
        ),
        ({"turns": [{"content": "a"}], "answer": "b"}, {"prompt": "turns.0.content"}, ("a", "b", ())),
        (
            {"a.b": "a", "answer": 1, "A": "x", "B": "y"},
            {"prompt": "a.b", "choices": ["A", "B"]},
            ("a", 1, ("x", "y")),
        ),
        (
            {"q": "a", "c": ["x", "y"], "i": 0},
            {"prompt": "q", "choices": "c", "answer": "i"},
            ("a", 0, ("x", "y")),
        ),
        ({"dialog": CHAT["messages"]}, {"messages": "dialog"}, ("Hi", "Hello", ())),
        ({"good": "x", "bad": "y"}, {"chosen": "good", "rejected": "bad"}, ("", 0, ("x", "y"))),
        (
            {"q": "a", "yes": "x", "no": "y"},
            {"prompt": "q", "chosen": "yes", "rejected": "no"},
            ("a", 0, ("x", "y")),
        ),
        ({**CHAT, "label": "good"}, {"answer": "label"}, ("Hi", "good", ())),
        ({**CHAT, "q": "a", "answer": "b"}, {"prompt": "q"}, ("a", "b", ())),
    ],
)
def test_a_map_of_fields_says_what_is_what(
    tmp_path: Path, row: dict[str, Any], fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({**row, "metadata": {"topic": "x"}, "n": 1}))
    found = read_items(ItemSource("items.jsonl", FieldMap.model_validate(fields)), tmp_path)
    (item,) = found.items
    assert (item.prompt, item.answer, item.choices) == expected
    assert item.metadata["topic"] == "x"
    assert item.metadata["n"] == 1
    assert f"by `fields` ({', '.join(found.source.fields.paths)})" in found.form
    assert found.source.fields.paths.keys() == fields.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": "qestion"},
            r"`fields.prompt`: must be a path in every row, but `qestion` is not in this one, "
            r"which has the keys `question`, `gold`\.",
        ),
        ({"prompt": "question", "answer": "gold.txt"}, "which has the keys `text`, `n` at `gold`"),
        ({"prompt": "question", "answer": "gold.n.5"}, r"which has a list of 1 at `gold\.n`"),
        ({"prompt": "question.text"}, "which has 'a' at `question`"),
        ({"prompt": "question", "messages": "gold"}, "must have `prompt` or `messages`, but has both"),
        (
            {"promt": "question"},
            "`objectives.skill.tasks.0.fields.promt`: unknown key. Did you mean `prompt`",
        ),
        ({"prompt": "gold"}, "`prompt`: must be text"),
        ({"chosen": "question"}, "must have both `chosen` and `rejected`, or neither"),
    ],
)
def test_a_wrong_map_of_fields_is_named(tmp_path: Path, fields: dict[str, str], message: str) -> None:
    path = write_suite(tmp_path, json.dumps({"question": "a", "gold": {"text": "b", "n": [1]}}).encode())
    suite = yaml.safe_load(path.read_text())
    suite["objectives"]["skill"]["tasks"][0]["fields"] = fields
    path.write_text(yaml.safe_dump(suite))
    with pytest.raises(MergetuneError, match=message):
        read_suite(path)


def test_rows_that_cannot_be_scored_are_all_named_and_may_be_left_out(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": str(i), "answer": "" if i in (2, 4, 5) else "a"}) for i in range(7)]
    path = write_suite(tmp_path, "\n".join(rows).encode(), scorer="contains")
    with pytest.raises(MergetuneError, match=r"line 3: .* 2 more cannot be scored either: 5, 6\."):
        read_suite(path)
    for scorer in ("choice", "json"):  # which none can be scored by: that is no fault of the rows
        with pytest.raises(MergetuneError, match="line 1: ") as caught:
            read_suite(write_suite(tmp_path, "\n".join(rows).encode(), scorer=scorer))
        assert "skip" not in str(caught.value)
    suite = yaml.safe_load(write_suite(tmp_path, "\n".join(rows).encode(), scorer="contains").read_text())
    task = suite["objectives"]["skill"]["tasks"][0]
    path.write_text(
        yaml.safe_dump({**suite, "objectives": {"skill": {"tasks": [{**task, "skip": [3, 5, 6]}]}}})
    )
    (items,) = read_suite(path).items.values()
    assert [item.prompt for item in items] == ["0", "1", "3", "6"]
    path.write_text(yaml.safe_dump({**suite, "objectives": {"skill": {"tasks": [{**task, "skip": [8]}]}}}))
    with pytest.raises(MergetuneError, match="`skip` must name rows that are there, but 8 is none of 7"):
        read_suite(path)


def test_answers_of_a_second_file_are_joined_by_id(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text("\n".join(f'{{"id": {i}, "prompt": "p{i}"}}' for i in (1, 2)))
    (tmp_path / "answers.csv").write_text("id,answer\n2,two\n1,one\n3,three\n")
    assert [i.answer for i in read(tmp_path, "items.jsonl", answers="answers.csv")] == ["one", "two"]
    assert [i.answer for i in read(tmp_path, "items.jsonl", answers="none")] == [[], []]
    assert [i.answer for i in read(tmp_path, "items.jsonl", answers="any")] == [{"call": "any"}] * 2
    (tmp_path / "other.jsonl").write_text('{"n": 2, "q": "p"}')
    fields = FieldMap(prompt="q", id="n")
    (item,) = read(tmp_path, "other.jsonl", answers="answers.csv", fields=fields)
    assert (item.prompt, item.answer, item.metadata) == ("p", "two", {"id": 2})
    for content, message in (
        (
            "id,answer\n1,one\n",
            r"items\.jsonl, line 2: `id` must be one of answers\.csv, but `2` is not there",
        ),
        ("id,answer\n1,a\n1,b\n", r"answers\.csv, row 3: `id` must stand once, but `1` stands twice"),
        (
            "id,gold\n1,a\n",
            r"answers\.csv, row 2: must have `ground_truth` or `answer`, but has `id`, `gold`",
        ),
        ("name,answer\n1,a\n", r"answers\.csv, row 2: `id` must be text or a whole number"),
    ):
        (tmp_path / "answers.csv").write_text(content)
        with pytest.raises(MergetuneError, match=message):
            read(tmp_path, "items.jsonl", answers="answers.csv")
    (tmp_path / "items.jsonl").write_text('{"id": 1, "prompt": "p", "answer": "a"}')
    with pytest.raises(MergetuneError, match="line 1: has an answer of its own"):
        read(tmp_path, "items.jsonl", answers="none")


@given(
    st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "id", "metadata", "x"]), JSON), max_size=3)
)
def test_what_is_read_has_all_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    """Whatever rows there are: they become items with all of their fields, or one message names a row."""
    folder = tmp_path_factory.mktemp("items")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    try:
        found, problem = read(folder, "items.jsonl"), ""
    except MergetuneError as error:
        found, problem = (), str(error)
    assert found or "items.jsonl" in problem
    for row, item in zip(rows, found, strict=not problem):
        assert (item.prompt, item.answer) == (row["prompt"], row.get("answer"))
        others = row.keys() - {"prompt", "answer", "metadata"}
        assert all(item.metadata[key] == row[key] for key in others if row[key] is not None)
