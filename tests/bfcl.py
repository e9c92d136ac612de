"""The Berkeley Function-Calling Leaderboard of the package bfcl-eval: its data, its checker, its decoder.

The package is installed without its dependencies, which are the clients of some forty vendors at pinned
versions. What is used here needs none of them, but imports three modules that do: a table of models, of which
one flag is read, and the parsers of Java and JavaScript, which are never called. Others stand in for these.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mergetune.evaluation.items import Item, ToolCall

IS_INSTALLED = find_spec("bfcl_eval") is not None
CATEGORIES = (
    *("simple_python", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
_MODEL = "tested"


def _stand_in(name: str, **contents: Any) -> None:
    module = ModuleType(f"bfcl_eval.{name}")
    vars(module).update(contents)
    sys.modules[module.__name__] = module


if IS_INSTALLED:
    _stand_in(
        "constants.model_config", MODEL_CONFIG_MAPPING={_MODEL: SimpleNamespace(underscore_to_dot=False)}
    )
    _stand_in("model_handler.parser.java_parser", parse_java_function_call=None)
    _stand_in("model_handler.parser.js_parser", parse_javascript_function_call=None)


@cache
def items(category: str) -> dict[str, Item]:
    """Return the items of a category by their ids, with the ground truth where it has one."""
    data = Path(str(import_module("bfcl_eval").__file__)).parent / "data"
    truths = _read(data / "possible_answer" / f"BFCL_v4_{category}.json")
    found = {}
    for row in _read(data / f"BFCL_v4_{category}.json").values():
        answer = truths[row["id"]]["ground_truth"] if truths else None
        found[row["id"]] = item(row["function"], answer, row["question"][0][-1]["content"])
    return found


def item(functions: list[dict[str, Any]], answer: Any, prompt: str = "x") -> Item:
    """Return an item with the functions as tools, in the types of the leaderboard."""
    tools = tuple({"type": "function", "function": function} for function in functions)
    return Item(prompt=prompt, tools=tools, answer=answer)


def accepts(category: str, asked: Item, calls: list[ToolCall]) -> bool:
    """Return the verdict of the leaderboard's checker on the calls of a reply."""
    checker = import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    verdict = checker.ast_checker(
        [tool["function"] for tool in asked.tools],
        [{call.name: call.arguments} for call in calls],
        asked.answer,
        import_module("bfcl_eval.constants.enums").Language.PYTHON,
        category,
        _MODEL,
    )
    return bool(verdict["valid"])


def decoded(reply: str) -> list[ToolCall]:
    """Return the calls in a reply as the leaderboard's decoder of Python calls reads them.

    Raises:
        Exception: it is no list of calls; which exception depends on the reply.
    """
    calls = import_module("bfcl_eval.model_handler.utils").default_decode_ast_prompting(reply)
    return [ToolCall(name=name, arguments=own) for call in calls for name, own in call.items()]


def makes_a_call(reply: str) -> bool:
    """Say whether a reply makes a call, as the runner of the categories of relevance decides it."""
    try:
        calls = [{call.name: call.arguments} for call in decoded(reply)]
    except Exception:  # as there
        return False
    return not import_module("bfcl_eval.utils").is_empty_output(calls)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row for row in rows}
