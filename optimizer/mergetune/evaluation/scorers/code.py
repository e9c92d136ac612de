"""The scorer `code`: the reply is Python code that passes the item's tests, in a sandbox."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import Field

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer, shown
from mergetune.machine import sandbox, sandboxed
from mergetune.machine.sandbox import Limits, passes

_FENCE = re.compile(r"^ *```(?P<language>\w*)[^\n]*\n(?P<code>.*?)(?:^ *```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "python", "py", "python3"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


class CodeScorer(BaseScorer):
    """The reply's code passes the item's tests: these run after it, in one module, without an exception.

    The code is what stands in the reply's first Markdown fence for Python, or else the whole reply. With
    `prepend_prompt` it goes on after the prompt, as in HumanEval (Chen et al. 2021). Where
    `metadata.entry_point` names a function, the tests' `check` is called with it, as there.
    """

    needs = (
        "`answer`: test code in Python; `metadata.entry_point`, where the tests have a function `check` that "
        "takes the function of this name"
    )
    scores = "1 if the reply's code and then the tests run without an exception, in a sandbox"
    modules = (sandbox, sandboxed)
    answers_are_replies = False
    runs_code = True
    reads_metadata = True

    kind: Literal["code"] = "code"
    prepend_prompt: bool = False
    timeout_s: float = Field(10.0, gt=0, le=600)
    memory_mb: int = Field(1024, ge=64)

    def score(self, items: Sequence[Item], replies: Sequence[str]) -> list[float]:
        """See `BaseScorer.score`; as many items run at a time as there are processors."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [float(has_passed) for has_passed in pool.map(self._passes, items, replies)]

    def check_item(self, item: Item, stop: Sequence[str] = (), *, is_example: bool = False) -> str | None:  # noqa: ARG002
        """See `BaseScorer.check_item`."""
        return self.lacking(item, is_example=is_example) or _tests_problem(item)

    def target_text(self, item: Item) -> str:
        """See `BaseScorer.target_text`: the tests."""
        return str(item.answer)

    def _passes(self, item: Item, reply: str) -> bool:
        code = code_in(reply)
        limits = Limits(seconds=self.timeout_s, memory_mb=self.memory_mb)
        return passes(item.prompt + code if self.prepend_prompt else code, _tests(item), limits)


def code_in(reply: str) -> str:
    """Return the code of a reply: what its first Markdown fence for Python holds, or else all of it."""
    fences = _FENCE.finditer(reply)
    return next((each["code"] for each in fences if each["language"].lower() in _PYTHON), reply)


def _entry_point(item: Item) -> str | None:
    return item.metadata.get("entry_point") if isinstance(item.metadata, dict) else None


def _tests(item: Item) -> str:
    entry_point = _entry_point(item)
    return item.answer if entry_point is None else f"{item.answer}\n\ncheck({entry_point})\n"


def _tests_problem(item: Item) -> str | None:
    """Say why an item's tests cannot tell replies apart; None where they may."""
    if not isinstance(item.answer, str):
        return f"`answer` must be test code in Python, but is {shown(item.answer)}."
    try:
        body = ast.parse(_tests(item)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"`answer` must be test code in Python, but is not ({error}): {shown(item.answer)}."
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    if _entry_point(item) is not None and "check" not in defined:
        return f"`metadata.entry_point` needs a function `check` in `answer`, which is {shown(item.answer)}."
    if all(map(_only_defines, body)):
        return (
            "`answer` must hold tests that run, but only defines something, so that every reply passes: it "
            f"is {shown(item.answer)}. Where it has a function `check`, give `metadata.entry_point`."
        )
    return None


def _only_defines(statement: ast.stmt) -> bool:
    """Say whether a statement passes whatever the reply is: it defines something, or calls nothing."""
    if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr)):
        return not any(isinstance(node, ast.Call) for node in ast.walk(statement))
    return isinstance(statement, _DEFINITIONS)
