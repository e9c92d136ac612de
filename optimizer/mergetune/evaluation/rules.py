"""Rules: one digest of everything that makes a score, beside the model and its engine."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers.scorer import BaseScorer
from mergetune.evaluation.suite import SuiteConfig, TaskConfig

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# What says which items there are: these have ids by content.
_OF_ITEMS = {"items", "limit", "fewshot_items", "fields", "answers", "split", "config_name", "skip"}
_OF_PROMPTS = {"chat_template", "system", "template_arguments", "thinking", "thinking_end", "truncate"}
_OF_DATA = {"dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "metadata"}


def rules_digest(task: Task, config: TaskConfig, suite: SuiteConfig, metric: str) -> str:
    """Return a digest of how a task's items are asked and scored, whichever its items.

    Beside what suite and task say it covers the few-shot examples and, of JSONL items, the source of their
    scorer and the files that it reads; of lm-eval's tasks, the source of every function that the task's file
    names, and of the files beside it, and lm-eval's version. Of JSONL items it has two parts, `asked-scored`:
    replies to what was asked in the same way can be scored anew.
    """
    shots = task.config.num_fewshot or 0
    asked: dict[str, Any] = {
        "suite": config.model_dump(mode="json", exclude={*_OF_ITEMS, "scorer"}),
        "examples": list(task.fewshot_docs())[:shots] if shots else [],
        "prompt": suite.model_dump(mode="json", include=_OF_PROMPTS),
    }
    scorer = config.scorer
    if scorer is not None:
        asked["asks"] = "reply" if scorer.asks == "tokens" else scorer.asks
        scored = [scorer.model_dump(mode="json"), scorer_code(type(scorer)), _digest_of(scorer.files), metric]
        return f"{_digest(asked)}-{_digest(scored)}"
    settings = task.config.to_dict(keep_callable=True)
    asked["metric"] = metric
    asked["task"] = {key: plain(value) for key, value in settings.items() if key not in _OF_DATA}
    asked["code"] = _code(type(task))
    asked["version"] = [str(task.VERSION), importlib.metadata.version("lm-eval")]
    return _digest(asked)


def are_asked_alike(first: str, second: str) -> bool:
    """Say whether items were asked in the same way, and perhaps scored otherwise, by two digests of rules."""
    return first == second or ("-" in first and first.partition("-")[0] == second.partition("-")[0])


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@functools.cache  # a process has one version of it
def scorer_code(scorer: type[BaseScorer]) -> str:
    """Return a digest of the code of a scorer, of its `modules`, of what all scorers share, and of items.

    It depends neither on where the files are, nor on their comments and docstrings, nor on the other scorers.
    """
    parts: list[type | ModuleType] = [Item, *scorer.modules]
    parts += [kind for kind in scorer.__mro__ if issubclass(kind, BaseScorer)]
    files = {Path(inspect.getfile(part)) for part in parts}
    code = sorted(code_alone(file.read_text(encoding="utf-8")) for file in files)
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def code_alone(source: str) -> str:
    """Return Python source without comments and docstrings, in one format."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            del node.body[0]
    return ast.unparse(tree)


def plain(value: Any) -> Any:
    """Return a task's setting as plain data: functions and classes as their names and sources."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, functools.partial):
        return [plain(each) for each in (value.func, value.args, value.keywords)]
    if callable(value):
        return _code(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _code(function: Any) -> list[str]:
    """Return a function's or a class's name, and a digest of the Python files that stand where it does."""
    kind = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        file = Path(inspect.getfile(kind))
    except (TypeError, OSError):  # built in
        return [str(getattr(kind, "__qualname__", kind))]
    return [kind.__qualname__, _digest_of(file.parent.glob("*.py"))]


def _digest_of(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        total.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()[:16]
