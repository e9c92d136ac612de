"""Files of items: what is read, and that files in another form are called what they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import mergetune
from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.suite import read_suite

GOOD = {"prompt": "Say hi", "answer": "hi"}
LINE = json.dumps(GOOD) + "\n"
CONVERSATION = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
MESSAGES = [{"role": "user", "content": "Hi"}]


def write_suite(folder: Path, content: bytes, scorer: str = "exact") -> Path:
    (folder / "items").write_bytes(content)
    tasks = [{"items": "items", "scorer": scorer}]
    suite = {"description": "test", "chat_template": False, "objectives": {"skill": {"tasks": tasks}}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


def items(folder: Path, content: bytes) -> tuple[Item, ...]:
    return read_suite(write_suite(folder, content)).items["items"]


@pytest.mark.parametrize(
    "content",
    [
        (2 * LINE).encode(),
        (2 * LINE).encode("utf-8-sig"),
        (2 * LINE).replace("\n", "\r\n").encode("utf-8-sig"),
        json.dumps([GOOD, GOOD]).encode(),
        json.dumps([GOOD, GOOD], indent=2).encode("utf-8-sig"),
        f"\n[{LINE},{LINE}]\n\n".encode(),
    ],
    ids=["lines", "mark", "mark and CRLF", "array", "array over lines", "array with lines"],
)
def test_lines_and_an_array_are_read(tmp_path: Path, content: bytes) -> None:
    assert items(tmp_path, content) == (Item(prompt="Say hi", answer="hi"),) * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"messages": MESSAGES},
            "a conversation in OpenAI's form. Conversations are not read: an item is one",
        ),
        (CONVERSATION, "a conversation in ShareGPT's form. Conversations are not read"),
        (
            {"instruction": "a", "input": "", "output": "b"},
            "an example in Alpaca's form. .*`output` to `answer`",
        ),
        ({"id": "s", "question": [[]], "function": [], "ground_truth": []}, "Berkeley Function-Calling"),
        ({"input": MESSAGES, "ideal": "b"}, "a sample of OpenAI's evals. .*rename `ideal` to `answer`"),
        ({"input": "a", "target": "b"}, "a sample of Inspect. Rename `input` to `prompt`"),
        ({"question": "a", "answer": "b"}, "has `question`, `answer`. Rename `question` to `prompt`"),
        ({"a": 1}, 'has `a`. An item is an object such as {"prompt"'),
        ({}, "the item is empty"),
        ({"prompt": MESSAGES, "answer": "b"}, "`prompt` must be text, but is a list. Conversations are not"),
        ({"prompt": "a", "completion": "b"}, "needs `answer`, .*Rename `completion` to `answer`"),
        ({"prompt": "a", "answer": None}, "needs `answer`, but it is missing or null"),
        ({"prompt": 3, "answer": "b"}, "`prompt`: must be text, but got 3. Put it in quotes"),
        ({"prompt": "a", "answer": "b", "patterns": ["b"]}, "`patterns` belongs to the scorer `regex`"),
        ({"prompt": "a", "answer": "\ud83d"}, "must be Unicode"),
        ({"prompt": "\ud83d", "answer": "b"}, "`prompt`: must be a valid"),
        ("x", 'must be one JSON object, .* but is "x"'),
        (["x"], r'must be one JSON object, .* but is \["x"\]'),
        (None, "must be one JSON object, .* but is null"),
    ],
)
def test_an_item_of_another_form_is_called_what_it_is(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(MergetuneError, match=rf"items, line 2: .*{message}"):
        items(tmp_path, (LINE + json.dumps(values)).encode())
    with pytest.raises(MergetuneError, match=rf"items, item 2: .*{message}"):
        items(tmp_path, json.dumps([GOOD, values]).encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,answer\nSay hi,hi\n", "line 1: is not JSON: .*A table .CSV. is written so by pandas"),
        (
            gzip.compress(LINE.encode(), mtime=0),
            "must be text in UTF-8, but is compressed by gzip. Unpack it",
        ),
        (b"PK\x03\x04 and so on", "is an archive"),
        (b"PAR1 and so on", "is a Parquet file"),
        (LINE.encode("utf-16"), "is text in UTF-16. Save it in UTF-8"),
        ('{"prompt": "Zoë"}'.encode("latin-1"), "must be text in UTF-8, but is not"),
        (b"\0\0\0", "line 1: is not JSON"),
        (json.dumps(GOOD, indent=2).encode(), "line 1: is not JSON: .* one JSON object over several lines"),
        ((LINE[:-1] + LINE).encode(), "line 1: is not JSON: Extra data"),
        ((LINE + LINE[:-3]).encode(), "line 2: is not JSON"),
        (json.dumps([GOOD, GOOD]).encode()[:-3], "is no JSON array: "),
        (b"[]", "holds no items, but `skill` needs at least one"),
        (b"\n \n", "holds no items, but `skill` needs at least one"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "line 1: is not JSON: Exceeds the limit"),
        (b"[" * 100_000, "is no JSON array: maximum recursion"),
    ],
)
def test_a_file_of_another_form_is_called_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(MergetuneError, match=rf"items(:|,) (?s:.*){message}"):
        items(tmp_path, content)


def test_a_folder_and_a_missing_file_are_no_items(tmp_path: Path) -> None:
    path = write_suite(tmp_path, b"")
    (tmp_path / "items").unlink()
    with pytest.raises(MergetuneError, match=r"items: cannot be read: No such file.*The items of `skill`"):
        read_suite(path)
    (tmp_path / "items").mkdir()
    with pytest.raises(MergetuneError, match="items: cannot be read: Is a directory"):
        read_suite(path)


def test_what_an_error_quotes_may_be_no_unicode(tmp_path: Path) -> None:
    path = write_suite(tmp_path, b'["\\ud83d"]')
    done = mergetune("eval", tmp_path, "--suite", path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert r"items, item 1: must be one JSON object" in done.stderr
    assert r"\ud83d" in done.stderr
