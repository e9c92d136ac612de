"""Scorers: what counts as right, what does not, and which answers no reply could satisfy."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Item, json_equal, load_json
from mergetune.evaluation.lm_tasks import item_of
from mergetune.evaluation.rules import scorer_code
from mergetune.evaluation.scorers import SCORERS, BaseScorer, ChoiceScorer, scorer_rows
from mergetune.evaluation.scorers.choice import choice_index
from mergetune.evaluation.scorers.json_answer import NOT_JSON, parse_json
from mergetune.evaluation.suite import read_suite
from scoring import score, scorer_of, write_suite

CALL = {"tool": "add", "arguments": {"title": "z", "tags": ["x", "y"], "days": 3}}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("kind", "reply", "answer", "expected"),
    [
        ("exact", " Paris \n", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("exact", "true", True, 1),
        ("exact", "True", True, 0),
        ("exact", "2", 2, 1),
        ("exact", "0.5", 0.5, 1),
        ("exact", "Paris", ["Rome", "Paris"], 1),
        ("exact", "false", ["no", False], 1),
        ("exact", '["Rome", "Paris"]', ["Rome", "Paris"], 0),
        ("contains", "It is Paris.", "Paris", 1),
        ("contains", "Paris and Rome", ["Rome", "Paris"], 1),
        ("contains", "Paris", ["Rome", "Paris"], 0),
        ("contains", "It is true.", True, 1),
        ("contains", "2 + 2 = 4", [2, 4], 1),
        ("json", '{"arguments": {"days": 3.0, "tags": ["x", "y"], "title": "z"}, "tool": "add"}', CALL, 1),
        ("json", '{"a": 1}', '{"a": 1}', 1),
        ("json", '{"a":1.0}', ' {"a": 1}\n', 1),
        ("json", '{"a": 2}', '{"a": 1}', 0),
        ("json", "1000.0", "1e3", 1),
        ("json", '"Paris"', '"Paris"', 1),
        ("json", "null", "null", 1),
        ("json", '{"name": "f", "arguments": "{\\"a\\": 1}"}', {"name": "f", "arguments": '{"a": 1}'}, 1),
        ("json", '```json\n{"a": 1}\n```', {"a": 1}, 1),
        ("json", 'Sure! {"a": 1}', {"a": 1}, 0),
        ("json", '{"a": true}', {"a": 1}, 0),
        ("json", '{"tags": ["b", "a"]}', {"tags": ["a", "b"]}, 0),
        ("json", '{"a": 1', {"a": 1}, 0),
        ("json", "null", {"a": 1}, 0),
        ("json", "[" * 100_000, [], 0),
        ("json", "```\n" + "\n" * 20_000, [], 0),
    ],
)
def test_scores(kind: str, reply: str, answer: Any, expected: float) -> None:
    assert score(scorer_of(kind), reply, answer) == expected


def test_case_may_be_ignored() -> None:
    assert score(scorer_of("exact", ignore_case=True), "PARIS", "paris") == 1
    assert score(scorer_of("exact", ignore_case=True), "True", True) == 1
    assert score(scorer_of("regex", ignore_case=True, patterns=("^yes",)), "YES!", None) == 1


def test_regex_scores_the_share_of_patterns_found() -> None:
    scorer = scorer_of("regex", patterns=(r"\?$", "^You"))
    assert score(scorer, "You can. Ready?", None, patterns=("tax", "10 minutes")) == 0.5


def test_more_digits_than_python_reads_are_a_wrong_answer() -> None:
    assert score(scorer_of("json"), "9" * 5000, 9) == 0


@pytest.mark.parametrize("reply", ["NaN", "-Infinity", "[NaN]", ""])
def test_what_json_does_not_have_is_no_json(reply: str) -> None:
    assert parse_json(reply) is NOT_JSON
    assert not json_equal(parse_json(reply), 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "regex", "patterns": ["("]}, "regular expression"),
        ({"kind": "exact", "patterns": ["x"]}, "belongs to the scorer `regex`"),
        ({"kind": "json", "per_character": True}, "belongs to the scorer `choice`"),
        ({"kind": "json", "ignore_case": True}, "belongs to `exact`, `contains` and `regex`"),
        ({"kind": "choice", "ignore_case": True}, "belongs to `exact`, `contains` and `regex`"),
    ],
)
def test_options_of_another_scorer_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer_of(**fields)


@pytest.mark.parametrize(
    "pattern", ["", ".*", "^", "$", "^.*", ".*$", "[^x]*", r"\s*", "(yes)?", "yes|", "(?i)", "^a|b?"]
)
def test_a_pattern_that_every_reply_matches_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="not every reply matches"):
        scorer_of("regex", patterns=(pattern,))


@pytest.mark.parametrize("pattern", ["(?!)", "$^"])
def test_a_pattern_that_no_reply_matches_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="some reply matches"):
        scorer_of("regex", patterns=(pattern,))


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "^.*$",
            "^[^x]*$",
            r"\A.{0,80}\Z",
            "(?s)^(?!.*sorry)",
            r"^(?:\w+\s?)*\?$",
            "a?\\$",
            r"\b",
            "(?=x)?",
        ),
        *(r"\A[^.!?:\n]{2,60}!", r"\?\s*\Z", "^*a", r"^\s*$"),
    ],
)
def test_a_pattern_that_some_replies_match_is_taken(pattern: str) -> None:
    assert scorer_of("regex", patterns=(pattern,)).model_dump()["patterns"] == (pattern,)


@pytest.mark.parametrize(
    ("answer", "texts"),
    [  # as it stands in the file; the reply that is right for exact, contains and json; None: refused
        ('"Paris"', ("Paris", "Paris", None)),
        ('" Paris\\n"', ("Paris", "Paris", None)),
        ('"Zoë"', ("Zoë", "Zoë", None)),
        ("2", ("2", "2", "2")),
        ("-7", ("-7", "-7", "-7")),
        ("0.5", ("0.5", "0.5", "0.5")),
        ("1.50", (None, None, "1.5")),  # a reply may write it in two ways
        ("1e3", (None, None, "1000.0")),
        ("1000.0", (None, None, "1000.0")),
        ("12345678901234567890123", ("12345678901234567890123",) * 3),
        ("0.12345678901234567890123", (None, None, "0.12345678901234568")),
        ("true", ("true", "true", "true")),
        ("false", ("false", "false", "false")),
        ("null", (None, None, None)),
        ('""', ("", None, None)),
        ('" "', ("", None, None)),
        ("[]", (None, None, "[]")),
        ("{}", (None, None, "{}")),
        ('["a", "b"]', ("a", "a, b", '["a", "b"]')),
        ('["a", 2, true]', ("a", "a, 2, true", '["a", 2, true]')),
        ('["a", ""]', ("a", None, '["a", ""]')),
        ('["a", " "]', ("a", None, '["a", " "]')),
        ('["a", null]', (None, None, '["a", null]')),
        ('["a", ["b"]]', (None, None, '["a", ["b"]]')),
        ('[{"a": 1}]', (None, None, '[{"a": 1}]')),
        ('{"a": [1, {"b": null}]}', (None, None, '{"a": [1, {"b": null}]}')),
        ('"{\\"a\\": 1}"', ('{"a": 1}', '{"a": 1}', '{"a": 1}')),
        ('"5"', ("5", "5", "5")),
        ('"null"', ("null", "null", "null")),
        ('"\\"Paris\\""', ('"Paris"', '"Paris"', '"Paris"')),
        ('"{\\"a\\": NaN}"', ('{"a": NaN}', '{"a": NaN}', None)),
    ],
)
def test_an_answer_is_read_as_what_it_plainly_is_or_refused(
    tmp_path: Path, answer: str, texts: tuple[str | None, ...]
) -> None:
    (tmp_path / "items.jsonl").write_text(f'{{"prompt": "x", "answer": {answer}}}\n')
    for kind, text in zip(("exact", "contains", "json"), texts, strict=True):
        suite = write_suite(tmp_path, {"scorer": kind})
        if text is None:
            with pytest.raises(MergetuneError, match=r"items\.jsonl, line 1: .*`answer`"):
                read_suite(suite)
            continue
        (item,) = read_suite(suite).items["items.jsonl"]
        assert scorer_of(kind).answer_text(item) == text
        assert scorer_of(kind).score([item, item], [text, "of no use"]) == [1, 0]


@pytest.mark.parametrize("answer", ["NaN", "-Infinity", '{"a": NaN}', "9" * 5000, "[" * 100_000])
def test_an_answer_that_json_does_not_have_is_refused(tmp_path: Path, answer: str) -> None:
    (tmp_path / "items.jsonl").write_text(f'{{"prompt": "x", "answer": {answer}}}\n')
    with pytest.raises(MergetuneError, match=r"items\.jsonl, line 1: is not JSON"):
        read_suite(write_suite(tmp_path, {"scorer": "json"}))


@pytest.mark.parametrize("kind", ["exact", "contains", "json"])
@given(value=JSON)
def test_the_text_of_every_answer_that_is_taken_scores(kind: str, value: Any) -> None:
    scorer, item = scorer_of(kind), Item(prompt="x", answer=load_json(json.dumps(value)))
    if scorer.check_item(item) is None:
        assert scorer.score([item], [scorer.answer_text(item)]) == [1]


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["blue", "red"], 1, 1),
        (["blue", "red"], 1.0, 1),
        (["blue", "red"], "A", 0),
        (["blue", "red"], " red", 1),
        ([" blue", " red"], "red", 1),
        (["B", "A"], "A", 1),  # its text comes before its letter
        (["10", "1"], "1", 1),
        (["blue", "red"], "1", None),  # from 0, or from 1?
        (["blue", "red"], "C", None),
        (["blue", "red"], "green", None),
        (["no", "yes"], True, None),
        (["blue", "red"], 2, None),
        (["blue", "red"], -1, None),
        (["blue", "red"], 0.5, None),
        (["blue", "red"], None, None),
        (["blue", "red"], [0], None),
        (["blue", ""], 0, None),
        (["blue", " "], 0, None),
        (["blue", "blue "], 0, None),
        (["blue"], 0, None),
    ],
)
def test_a_choice_is_named_by_index_text_or_letter(
    tmp_path: Path, choices: list[str], answer: Any, index: int | None
) -> None:
    items = [{"prompt": f"Sky {n}?", "choices": choices, "answer": answer} for n in range(2)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    path = write_suite(tmp_path, {"scorer": "choice"})
    if index is None:
        with pytest.raises(MergetuneError, match="line 1: the scorer `choice` needs"):
            read_suite(path)
        return
    assert choice_index(choices, answer) == index
    (bound,) = Evaluator(read_suite(path)).tasks.values()
    assert bound.task.doc_to_target(bound.docs[0]) == index
    assert bound.target(0) == choices[index]


@pytest.mark.parametrize(
    ("scorer", "stop", "answer", "is_refused"),
    [
        ("exact", "\n", "one\ntwo", True),
        ("exact", "\n", "one\n", False),  # space at the ends does not count
        ("exact", ".", ["Yes", "No."], True),
        ("contains", ".", ["Yes", "No."], True),
        ("exact", ";", "one", False),
        ("json", "\n", {"text": "one\ntwo"}, False),
        ("json", "}", {"a": 1}, True),
        ("json", " ", {"a": 1}, False),
        ({"kind": "exact", "ignore_case": True}, "Y", "Yes", False),
        ({"kind": "exact", "ignore_case": True}, "\n", "one\ntwo", True),
    ],
)
def test_an_answer_that_a_stop_string_cuts_off_is_refused(
    tmp_path: Path, scorer: Any, stop: str, answer: Any, is_refused: bool
) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": "x", "answer": answer}))
    path = write_suite(tmp_path, {"scorer": scorer, "stop": [stop]})
    if is_refused:
        with pytest.raises(MergetuneError, match="line 1: `answer` holds the stop string"):
            read_suite(path)
    else:
        read_suite(path)


@pytest.mark.parametrize(
    ("scorer", "answer", "text"),
    [
        ("exact", True, "true"),
        ("exact", ["a", "b"], "a"),
        ("contains", [1, "b"], "1, b"),
        ("json", '{"name":"Zoë"}', '{"name":"Zoë"}'),
        ("json", {"name": "Zoë"}, '{"name": "Zoë"}'),
        ({"kind": "regex", "patterns": ["^[0-9]"]}, 4, "4"),
    ],
)
def test_examples_show_the_text_that_is_scored(tmp_path: Path, scorer: Any, answer: Any, text: str) -> None:
    items = [{"prompt": f"p{n}", "answer": answer} for n in range(3)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {"scorer": scorer, "fewshot_items": "items.jsonl", "num_fewshot": 1}
    (bound,) = Evaluator(read_suite(write_suite(tmp_path, task))).tasks.values()
    (example,) = list(bound.task.fewshot_docs())[:1]
    assert bound.task.doc_to_target(example) == text
    assert bound.measured({1: [text]}) == {1: {"score": 1}}
    assert bound.target(1).endswith("^[0-9]" if isinstance(scorer, dict) else text)


def test_an_example_needs_an_answer_though_its_scorer_does_not(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"prompt": "x"}\n')
    scorer = {"kind": "regex", "patterns": ["^x"]}
    read_suite(write_suite(tmp_path, {"scorer": scorer}))
    with pytest.raises(MergetuneError, match="line 1: a few-shot example needs `answer`"):
        read_suite(
            write_suite(tmp_path, {"scorer": scorer, "fewshot_items": "items.jsonl", "num_fewshot": 1})
        )


def test_a_pattern_without_end_names_item_and_pattern(tmp_path: Path) -> None:
    items = [{"prompt": f"Say a, {n} times.", "patterns": ["^(a|aa)+$"]} for n in range(2)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (bound,) = Evaluator(read_suite(write_suite(tmp_path, {"scorer": "regex"}))).tasks.values()
    assert bound.measured({0: ["a" * 36]}) == {0: {"score": 1}}
    with pytest.raises(MergetuneError, match=r"The item 'Say a, 1 times.' .* the pattern '\^\(a\|aa\)\+\$'"):
        bound.measured({1: ["a" * 60 + "b"]})


def test_a_pattern_with_repetitions_in_repetitions_ends() -> None:
    assert score(scorer_of("regex", patterns=(r"^(\w+\s?)+[.!?]$",)), "a" * 36, None) == 0


@pytest.fixture(scope="module")
def choosing() -> Any:
    """A multiple-choice task as lm-eval has it; the first choice is right."""
    rows = Dataset.from_list([{"prompt": "x", "choices": ["a", "b"]}])
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    settings = {
        "task": "choosing",
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": lambda doc: 0,
        "metric_list": metrics,
    }
    return ConfigurableTask(config=settings)


@given(
    choices=st.lists(st.text("aé語", min_size=1), min_size=2, max_size=4, unique=True),
    likelihoods=st.lists(st.floats(-50, 0), min_size=4, max_size=4),
)
def test_a_choice_scores_as_in_lm_eval(choosing: Any, choices: list[str], likelihoods: list[float]) -> None:
    item, likely = Item(prompt="x", choices=tuple(choices), answer=0), likelihoods[: len(choices)]
    expected = choosing.process_results({"choices": choices}, [(each, False) for each in likely])
    for scorer in (ChoiceScorer(), ChoiceScorer(per_character=True)):
        assert scorer.score([item], [likely]) == [expected[scorer.metric]]


def test_a_scorer_sees_the_item_with_its_messages_and_metadata(tmp_path: Path) -> None:
    item = {"prompt": "Say yes.", "answer": "yes", "metadata": {"from": ["a", 1]}, "note": "beside it"}
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, [item, {**item, "system": "Be terse."}])))
    path = write_suite(tmp_path, {"scorer": "exact", "system": "Be brief."})
    (bound,) = Evaluator(read_suite(path)).tasks.values()
    for doc, system in zip(bound.docs, ("Be brief.", "Be terse."), strict=True):
        asked = item_of(doc)
        assert asked.metadata == {"from": ["a", 1], "note": "beside it"}
        assert [message.as_dict() for message in asked.conversation] == [
            {"role": "system", "content": system},
            {"role": "user", "content": "Say yes."},
        ]


def test_ids_know_nothing_of_metadata(tmp_path: Path) -> None:
    ids = []
    for extra in ({}, {"metadata": {"customer": 1}}):
        rows = [{"prompt": str(number), "answer": "y", **extra} for number in range(8)]
        (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (bound,) = Evaluator(read_suite(write_suite(tmp_path, {"scorer": "exact"}))).tasks.values()
        ids.append(bound.item_ids)
    assert ids[0] == ids[1]


def test_the_digest_of_a_scorer_follows_its_own_code(tmp_path: Path) -> None:
    """And that of its modules, of what scorers share and of items, wherever these stand."""
    code = "from mergetune.evaluation.scorers.scorer import BaseScorer\n\n\nclass Own(BaseScorer): ...\n"

    def loaded(name: str, text: str) -> ModuleType:
        file = tmp_path / name / "own.py"
        file.parent.mkdir()
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def digest(name: str, text: str, *modules: ModuleType) -> str:
        scorer: type[BaseScorer] = loaded(name, text).Own
        scorer.modules = modules
        return scorer_code(scorer)

    first, moved, changed = digest("own_1", code), digest("own_2", code), digest("own_3", f"{code}x = 1\n")
    assert first == moved != changed
    helpers = [loaded("help_1", ""), loaded("help_2", ""), loaded("help_3", "x = 1\n")]
    helped = [digest(f"helped_{number}", code, helper) for number, helper in enumerate(helpers)]
    assert first != helped[0] == helped[1] != helped[2]
    assert len({scorer_code(scorer) for scorer in SCORERS.values()}) == len(SCORERS)


def test_the_docs_have_a_row_for_each_scorer() -> None:
    assert [kind for kind, _, _ in scorer_rows()] == list(SCORERS)
    assert all(needs and scores for _, needs, scores in scorer_rows())
