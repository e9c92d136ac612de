"""lm-eval tasks: made of JSONL items, or found by name; few-shot examples fixed for all items."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from mergetune.errors import MergetuneError
from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers import Scorer
from mergetune.evaluation.suite import CODE_RUNS, Suite, TaskConfig
from mergetune.files.library import placed
from mergetune.files.yaml_io import nearest

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_CODE_EVAL = "HF_ALLOW_CODE_EVAL"  # what the metric `code_eval` of the library `evaluate` asks for
METADATA = "metadata"  # the one field of a document of a JSONL task that is no part of an item's id


def jsonl_task(name: str, config: TaskConfig, items: Mapping[str, Sequence[Item]]) -> Task:
    """Make an lm-eval task of a file of items."""
    from lm_eval.api.task import ConfigurableTask

    assert config.source is not None
    assert config.scorer is not None  # TaskConfig
    asked = items[config.source.name]
    data = {"test": _dataset(asked, config)}
    if config.fewshot_source is not None:
        data["fewshot"] = _dataset(items[config.fewshot_source.name], config)
    settings = {
        "task": name,
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "fewshot_split": "fewshot" if config.fewshot_items else None,
        "num_fewshot": config.num_fewshot or 0,
        "doc_to_text": "prompt",
        "description": "system",
        "process_results": _unused,
        "metric_list": [
            {
                "metric": config.scorer.metric,
                "aggregation": "mean",
                "higher_is_better": config.scorer.higher_is_better,
            }
        ],
    }
    if config.scorer.asks == "likelihoods":
        settings |= {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda doc: list(item_of(doc).choices),
            "doc_to_target": _right_choice(config.scorer),
            "target_delimiter": _delimiter(asked),
        }
    else:
        settings |= {
            "output_type": "generate_until",
            "doc_to_target": "target",
            "generation_kwargs": {
                "until": list(config.stop),
                "max_gen_toks": config.max_new_tokens,
                "do_sample": False,
            },
        }
    return ConfigurableTask(config=settings)


def _dataset(items: Sequence[Item], config: TaskConfig) -> Any:
    """Hold items as a dataset of plain strings: Arrow would give answers of other shapes one schema."""
    from datasets import Dataset

    assert config.scorer is not None  # TaskConfig
    return Dataset.from_list(
        [
            {
                "prompt": item.prompt,
                "system": config.system if item.system is None else item.system,
                "target": config.scorer.answer_text(item),
                "payload": item.model_dump_json(exclude={"metadata"}),
                METADATA: json.dumps(item.metadata),
            }
            for item in items
        ]
    )


def item_of(doc: Mapping[str, str]) -> Item:
    """Return the item that a document of a JSONL task was made of, with the system message that it gets."""
    fields = json.loads(doc["payload"])
    return Item.model_validate(fields | {"system": doc["system"], "metadata": json.loads(doc[METADATA])})


def _delimiter(items: Sequence[Item]) -> str:
    """Return what stands between prompt and choice: no second space after a first, and none before a text."""
    return "" if all(not item.prompt or item.prompt[-1].isspace() for item in items) else " "


def _right_choice(scorer: Scorer) -> Callable[[Mapping[str, str]], int]:
    def doc_to_target(doc: Mapping[str, str]) -> int:
        item = item_of(doc)
        return item.choices.index(scorer.target_text(item))

    return doc_to_target


def _unused(*_: Any) -> NoReturn:
    """Stand in the place where lm-eval's own tasks score: items are scored together, by their scorer."""
    raise NotImplementedError


def lm_eval_tasks(name: str, suite: Suite) -> dict[str, Task]:
    """Load an lm-eval task, or each task of a group, from the suite's `include_path` or by name."""
    from lm_eval.tasks import TaskManager

    include = suite.config.include_path
    manager = None
    if include is not None:
        manager = TaskManager(include_path=str(placed(suite.path.parent, include)), include_defaults=False)
    if manager is None or name not in manager.all_tasks:  # the index of all tasks takes seconds
        manager = TaskManager()
    if name not in manager.all_tasks:
        raise MergetuneError(f"lm-eval has no task `{name}`.{nearest(name, manager.all_tasks)}")
    try:
        with code_eval_allowed(suite.config.allow_code_execution):
            tasks: dict[str, Task] = manager.load([name])["tasks"]
    except Exception as error:  # whatever a data set's loading raises
        if _CODE_EVAL in str(error):
            raise MergetuneError(f"The task `{name}` would {CODE_RUNS}.") from error
        raise MergetuneError(f"lm-eval cannot load `{name}`: {error}") from error
    return tasks


@contextmanager
def code_eval_allowed(is_allowed: bool) -> Iterator[None]:
    """Let lm-eval's tasks run code that a model wrote, for so long: their metrics ask for this variable."""
    before = os.environ.get(_CODE_EVAL)
    if is_allowed:
        os.environ[_CODE_EVAL] = "1"
    try:
        yield
    finally:
        if is_allowed:
            del os.environ[_CODE_EVAL]
            os.environ.update({} if before is None else {_CODE_EVAL: before})


def fix_fewshot(task: Task, docs: Sequence[Any]) -> int:
    """Give every item the same few-shot examples, whichever items run.

    lm-eval draws them at random in the order in which items run, so that a subset would see other
    prompts than the whole. The first n examples are taken instead. Returns how many of the first
    documents to evaluate, `docs`, serve as examples; they belong to no split, for the answer would be shown.
    """
    from lm_eval.api.samplers import FirstNSampler

    n = task.config.num_fewshot or 0
    if n == 0:
        task.set_config("num_fewshot", 0)
        return 0
    pool = list(task.fewshot_docs())
    task.sampler = FirstNSampler(pool)
    return n if pool[:n] == list(docs[:n]) else 0
