"""What users write, read strictly: each mistake is one line that names its place and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import SuiteConfig
from mergetune.files.yaml_io import _FILES, Strict, read_yaml, validate
from mergetune.results.config import StudyConfig
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space_config import SearchSpaceConfig


class Part(Strict):
    low: float
    size: int = Field(1, gt=0)


class Whole(Strict):
    parts: dict[str, Part | float] = Field(min_length=1)
    names: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    is_on: bool = False
    colour: Literal["red", "green"] = "red"


def mistakes(**data: Any) -> list[str]:
    """Return the lines of the error."""
    with pytest.raises(MergetuneError) as caught:
        validate({"parts": {"a": 1}, **data}, Whole, "file.yaml")
    first, _, rest = str(caught.value).partition(":")
    assert first == "file.yaml"
    return [line.strip() for line in rest.strip().splitlines()]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"parts": {}}, ["`parts`: must name at least one part, but is empty."]),
        ({"parts": 3}, ["`parts`: must be `name: value` pairs, but got 3."]),
        (
            {"parts": {"a": "x"}},
            ["`parts.a`: must be `key: value` pairs (low, size) or a number, but got 'x'."],
        ),
        (
            {"parts": {"a": {"lwo": 1}}},
            ["`parts.a.low`: is required, but missing.", "`parts.a.lwo`: unknown key. Did you mean `low`?"],
        ),
        (
            {"parts": {"Part": {"low": 1, "size": 0}}},
            ["`parts.Part.size`: must be greater than 0, but got 0."],
        ),
        ({"parts": {"a": {"low": 1, "size": 1.5}}}, ["`parts.a.size`: must be a whole number, but got 1.5."]),
        ({"names": "x"}, ["`names`: must be a list, but got 'x'."]),
        ({"names": ["x", 3]}, ["`names.1`: must be text, but got 3. Put it in quotes."]),
        ({"layers": [1]}, ["`layers.1`: is required, but missing."]),
        ({"is_on": "maybe"}, ["`is_on`: must be true or false, but got 'maybe'."]),
        ({"is_on": None}, ["`is_on`: must be true or false, but is empty."]),
        (
            {"colour": "gren"},
            ["`colour`: must be 'red' or 'green', but got 'gren'. Did you mean `green`?"],
        ),
        ({"colour": "blue"}, ["`colour`: must be 'red' or 'green', but got 'blue'."]),
        ({"colour": 3}, ["`colour`: must be 'red' or 'green', but got 3."]),
        (
            {"part": {}, "nmaes": []},
            ["`part`: unknown key. Did you mean `parts`?", "`nmaes`: unknown key. Did you mean `names`?"],
        ),
    ],
)
def test_each_mistake_is_one_line_in_plain_words(data: dict[str, Any], lines: list[str]) -> None:
    assert mistakes(**data) == lines


def test_a_list_that_is_left_empty_is_absent() -> None:
    assert validate({"parts": {"a": 1}, "names": None}, Whole, "file.yaml").names == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold `key: value` pairs, but is empty"),
        (b"- parts", r"must hold `key: value` pairs, but got \['parts'\]"),
        (b"parts: [", "is not valid YAML"),
        (b"parts: {a: 1}\nparts: {a: 2}", "the key `parts` is given twice"),
        (b"parts: {{ value }}", "line 1, column 9: a key must be plain text"),
        (b"parts:\n\ta: 1", "line 2, column 1: .* Indent with spaces: YAML takes no tabs there"),
        (b"parts: {<<: {a: 1}, <<: {b: 1}}", "the key `<<` is given twice"),
        (b"parts: {<<: 3}", "expected a mapping or list of mappings for merging"),
        (b"parts: 2024-99-99", "a value is wrong"),
        (b"[" * 5000, "nested too deep"),
        (b"\x1f\x8b\x08", "must be text in UTF-8, but is compressed by gzip. Unpack it"),
        (b"\xff\xfe\x00", "must be text in UTF-8"),
    ],
)
def test_a_file_that_holds_no_pairs_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(MergetuneError, match=rf"file\.yaml: (?s:.*){message}"):
        read_yaml(tmp_path / "file.yaml", Whole)
    with pytest.raises(MergetuneError, match=r"absent\.yaml: cannot be read"):
        read_yaml(tmp_path / "absent.yaml", Whole)


SCHEMAS: dict[str, type[Strict]] = {
    "a study file": StudyConfig,
    "a recipe": MergeRecipe,
    "a suite": SuiteConfig,
    "a search space": SearchSpaceConfig,
}


@pytest.mark.parametrize(("what", "keys"), [(what, keys) for what, keys, _ in _FILES])
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, what: str, keys: set[str]) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(dict.fromkeys(keys, "x")))
    if what in SCHEMAS:  # the table has the very keys that such a file must have
        assert keys == {name for name, field in SCHEMAS[what].model_fields.items() if field.is_required()}
    for other, schema in SCHEMAS.items():
        with pytest.raises(MergetuneError) as caught:
            read_yaml(path, schema)
        assert (f"is {what}" in str(caught.value)) == (other != what)


def test_a_file_with_a_key_too_many_is_still_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("method: ties\nbase: {path: b}\nexperts: {}\ngroups: []\ndescription: x\n")
    with pytest.raises(MergetuneError, match="`description`: unknown key"):
        read_yaml(path, MergeRecipe)


def test_merge_keys_and_a_mark_at_the_beginning_are_read(tmp_path: Path) -> None:
    text = """\ufeffdescription: x
chat_template: false
objectives:
  one: &one
    weight: 2
    tasks:
      - &task {items: one.jsonl, scorer: &scorer {kind: contains}, max_new_tokens: 4}
  two:
    <<: *one
    weight: 3
    tasks:
      - {<<: [*task], items: two.jsonl, scorer: *scorer}
"""
    (tmp_path / "suite.yaml").write_text(text, encoding="utf-8")
    two = read_yaml(tmp_path / "suite.yaml", SuiteConfig).objectives["two"]
    assert (two.weight, two.tasks[0].items, two.tasks[0].max_new_tokens) == (3, "two.jsonl", 4)
    (tmp_path / "twice.yaml").write_text(text.replace("    weight: 3\n", "    weight: 3\n    weight: 4\n"))
    with pytest.raises(MergetuneError, match="the key `weight` is given twice"):
        read_yaml(tmp_path / "twice.yaml", SuiteConfig)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("1", "a number"),
        ("2024", "a number"),
        ("1.5", "a number"),
        ("no", "true or false"),
        ("on", "true or false"),
        ("~", "nothing"),
        ("2024-01-01", "a date"),
    ],
)
def test_a_key_that_yaml_reads_as_something_else_needs_quotes(tmp_path: Path, key: str, what: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"base: b\nexperts: {{{key}: a}}\n")
    said = (
        f'line 2, column 11: a key must be text, but YAML reads `{key}` as {what}: put it in quotes, "{key}"'
    )
    with pytest.raises(MergetuneError, match=re.escape(said)):
        read_yaml(path, StudyConfig)


def test_a_key_in_quotes_is_text(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("base: b\nexperts: {'no': a, \"2024\": b}\nsearch_space: s\nsuite: s\n")
    assert read_yaml(path, StudyConfig).experts == {"no": "a", "2024": "b"}


def parts(tmp_path: Path, text: str) -> dict[str, Part | float]:
    (tmp_path / "file.yaml").write_text(text)
    return read_yaml(tmp_path / "file.yaml", Whole).parts


def test_what_a_mapping_says_itself_counts_before_what_is_merged_into_it(tmp_path: Path) -> None:
    text = "x-part: &part {low: 1, size: 2}\nparts:\n  a: {<<: *part, size: 3}\n  b: {size: 4, <<: *part}\n"
    assert parts(tmp_path, text) == {"a": Part(low=1, size=3), "b": Part(low=1, size=4)}


def test_of_several_merged_mappings_the_first_counts(tmp_path: Path) -> None:
    text = "x-one: &one {low: 1}\nx-two: &two {low: 2, size: 2}\nparts: {a: {<<: [*one, *two]}}\n"
    assert parts(tmp_path, text) == {"a": Part(low=1, size=2)}


def test_a_mapping_that_was_merged_may_be_merged_again(tmp_path: Path) -> None:
    text = "parts: &parts\n  a: &a {low: 1, size: 2}\n  b: &b {<<: *a, low: 2}\n  c: {<<: *b, low: 3}\n"
    found = {"a": Part(low=1, size=2), "b": Part(low=2, size=2), "c": Part(low=3, size=2)}
    assert parts(tmp_path, text) == found
    # what is merged stands deeper than what it is merged into, and is read after it
    text = "x-a: &a {low: 1}\nx-deep: {deep: {b: &b {<<: *a, low: 2}}}\nparts: {c: {<<: *b}}\n"
    assert parts(tmp_path, text) == {"c": Part(low=2)}


def test_a_key_given_twice_in_what_is_merged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match="line 1, column 24: the key `low` is given twice"):
        parts(tmp_path, "x-part: &part {low: 1, low: 2}\nparts: {a: {<<: *part}}\n")


def test_only_keys_at_the_top_are_left_out_by_their_beginning(tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match=r"`parts\.a\.x-size`: unknown key"):
        parts(tmp_path, "x-any: [1]\nparts: {a: {low: 1, x-size: 2}}\n")
