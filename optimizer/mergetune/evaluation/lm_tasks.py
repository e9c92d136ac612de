"""lm-eval tasks: made of JSONL items, or found by name; few-shot examples fixed for all items."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergetune.errors import MergetuneError
from mergetune.evaluation.answers import answer_text, choice_index
from mergetune.evaluation.scorers import Scorer
from mergetune.evaluation.suite import Item, Suite, TaskConfig
from mergetune.files.library import placed
from mergetune.files.yaml_io import nearest

if TYPE_CHECKING:
    from lm_eval.api.task import Task


def jsonl_task(name: str, config: TaskConfig, items: Mapping[str, Sequence[Item]]) -> Task:
    """Make an lm-eval task of a JSONL file."""
    from lm_eval.api.task import ConfigurableTask

    assert config.items is not None
    assert config.scorer is not None  # TaskConfig
    data = {"test": _dataset(items[config.items], config)}
    if config.fewshot_items is not None:
        data["fewshot"] = _dataset(items[config.fewshot_items], config)
    common = {
        "task": name,
        "custom_dataset": lambda **_: data,
        "test_split": "test",
        "fewshot_split": "fewshot" if config.fewshot_items else None,
        "num_fewshot": config.num_fewshot or 0,
        "doc_to_text": "prompt",
        "description": "system",
    }
    if config.scorer.kind == "choice":
        metric = "acc_norm" if config.scorer.per_character else "acc"
        own = {
            "output_type": "multiple_choice",
            "doc_to_choice": _payload("choices"),
            "doc_to_target": _right_choice,
            "target_delimiter": _delimiter(items[config.items]),
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        own = {
            "output_type": "generate_until",
            "doc_to_target": "target",
            "process_results": _scoring(config.scorer),
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {
                "until": list(config.stop),
                "max_gen_toks": config.max_new_tokens,
                "do_sample": False,
            },
        }
    return ConfigurableTask(config={**common, **own})


def _dataset(items: Sequence[Item], config: TaskConfig) -> Any:
    """Hold items as a dataset of plain strings: Arrow would give answers of other shapes one schema."""
    from datasets import Dataset

    assert config.scorer is not None  # TaskConfig
    kind = config.scorer.kind
    return Dataset.from_list(
        [
            {
                "prompt": item.prompt,
                "system": config.system if item.system is None else item.system,
                "target": "" if item.answer is None else answer_text(kind, item.answer),
                "payload": item.model_dump_json(),
            }
            for item in items
        ]
    )


def item_answer(doc: Mapping[str, str]) -> Any:
    """Return the answer of a JSONL item's document as the item has it."""
    return _payload("answer")(doc)


def item_patterns(doc: Mapping[str, str]) -> list[str]:
    """Return the patterns that a JSONL item's document has of its own."""
    patterns: list[str] = _payload("patterns")(doc)
    return patterns


def _payload(key: str) -> Callable[[Mapping[str, str]], Any]:
    return lambda doc: json.loads(doc["payload"])[key]


def _delimiter(items: Sequence[Item]) -> str:
    """Return what stands between prompt and choice: no second space after a first."""
    return "" if all(item.prompt[-1].isspace() for item in items) else " "


def _right_choice(doc: Mapping[str, str]) -> int | None:
    item = json.loads(doc["payload"])
    return choice_index(item["choices"], item["answer"])


def _scoring(scorer: Scorer) -> Callable[[Mapping[str, str], list[str]], dict[str, float]]:
    def process_results(doc: Mapping[str, str], results: list[str]) -> dict[str, float]:
        item = json.loads(doc["payload"])
        try:
            return {"score": scorer.score(results[0], item["answer"], item["patterns"])}
        except MergetuneError as error:
            raise MergetuneError(f"The item {doc['prompt'][:80]!r} cannot be scored: {error}") from error

    return process_results


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
        tasks: dict[str, Task] = manager.load([name])["tasks"]
    except Exception as error:  # whatever a data set's loading raises
        raise MergetuneError(f"lm-eval cannot load `{name}`: {error}") from error
    return tasks


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
