"""Evaluate a model on a suite through lm-eval; every score is kept per item."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from optimizer.errors import MergetuneError, TrialError
from optimizer.lm_tasks import fix_fewshot, item_patterns, jsonl_task, lm_eval_tasks
from optimizer.suite import Split, Suite, TaskConfig, split_of
from optimizer.yaml_io import nearest

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

Documents = Mapping[str, Sequence[int]]  # by task, indices of its documents
ITEM_KEYS = ["score_name", "task", "item"]  # the columns that name a row of a measurement


@dataclass(frozen=True)
class Score:
    """A mean score with its standard error and the number of items behind it."""

    value: float
    stderr: float
    n_items: int


@dataclass(frozen=True)
class Measurement:
    """The per-item scores of one model on one split of a suite, and what they cost.

    `items` has a row per item: `score_name` (objective or guard), `task`, `item` (an id that depends
    on the content only), `score` and `response`.
    """

    items: pd.DataFrame
    seconds: float

    def scores(self) -> dict[str, Score]:
        """Return each objective's and guard's mean over its tasks of the mean over their items."""
        return {
            str(name): _mean_over_tasks(rows) for name, rows in self.items.groupby("score_name", sort=False)
        }


@dataclass(frozen=True)
class BoundTask:
    """An lm-eval task in its place in the suite, with the ids and splits of its documents."""

    score_name: str
    config: TaskConfig
    task: Task
    item_ids: tuple[str, ...]
    splits: tuple[Split | None, ...]  # None: a few-shot example, in no split

    def indices(self, split: Split) -> list[int]:
        """Return the documents of a split."""
        return [index for index, own in enumerate(self.splits) if own == split]


class Evaluator:
    """A suite made ready once a study: its lm-eval tasks are built and its items split.

    Raises:
        MergetuneError: a task is unknown or its data cannot be had, or has fewer than two items in a split.
    """

    def __init__(self, suite: Suite) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.suite = suite
        self._tasks: dict[str, BoundTask] = {}
        for score_name, score in suite.config.scores.items():
            for config in score.tasks:
                self._add(score_name, config)
        self._check_splits()

    @property
    def tasks(self) -> dict[str, BoundTask]:
        """The tasks by name, each in its place in the suite."""
        return self._tasks

    def count(self, split: Split) -> int:
        """Count the items of a split."""
        return sum(len(bound.indices(split)) for bound in self._tasks.values())

    def documents(self, split: Split | Literal["all"]) -> Documents:
        """Return the documents of a split, or of both."""
        splits: list[Split] = ["search", "holdout"] if split == "all" else [split]
        return {
            name: [index for each in splits for index in bound.indices(each)]
            for name, bound in self._tasks.items()
        }

    def measure(self, lm: LM, split: Split) -> Measurement:
        """Score a model on every item of a split; see `measure_documents`."""
        return self.measure_documents(lm, self.documents(split))

    def measure_documents(self, lm: LM, documents: Documents) -> Measurement:
        """Score a model on some of the items.

        Raises:
            TrialError: a score is not a finite number.
        """
        from lm_eval.evaluator import evaluate

        start = time.perf_counter()
        wanted = {name: (self._tasks[name], indices) for name, indices in documents.items() if indices}
        results = evaluate(
            lm=lm,
            task_dict={"tasks": {name: bound.task for name, (bound, _) in wanted.items()}, "groups": {}},
            samples={name: list(indices) for name, (_, indices) in wanted.items()},
            bootstrap_iters=0,
            apply_chat_template=self.suite.config.chat_template,
            fewshot_as_multiturn=self.suite.config.chat_template,
        )
        rows = [
            _row(bound, sample)
            for name, (bound, _) in wanted.items()
            for sample in _one_filter(results["samples"][name], bound.config.filter)
        ]
        return Measurement(pd.DataFrame(rows), time.perf_counter() - start)

    def items(self) -> pd.DataFrame:
        """Return a row per item of the suite: its id, its place, its split, prompt and target."""
        rows = [
            {
                "score_name": bound.score_name,
                "task": name,
                "item": bound.item_ids[index],
                "split": split,
                "prompt": _prompt(bound.task, doc),
                "target": _target_text(bound, doc),
            }
            for name, bound in self._tasks.items()
            for index, (doc, split) in enumerate(zip(bound.task.eval_docs, bound.splits, strict=False))
            if split is not None
        ]
        return pd.DataFrame(rows)

    def keys(self, documents: Documents) -> pd.DataFrame:
        """Return a row per document: score_name, task, document (its index), item and key.

        The key is a digest of all that the answer depends on beside the model: the rendered document,
        the examples before it, the task's settings, and what version of the code scores it.
        """
        rows = []
        for name, indices in documents.items():
            bound = self._tasks[name]
            settings = _settings(bound, self.suite.config.chat_template)
            for index in indices:
                text = [settings, bound.item_ids[index], _prompt(bound.task, bound.task.eval_docs[index])]
                key = hashlib.sha256("\0".join(text).encode()).hexdigest()
                rows.append((bound.score_name, name, index, bound.item_ids[index], key))
        return pd.DataFrame(rows, columns=["score_name", "task", "document", "item", "key"])

    def _add(self, score_name: str, config: TaskConfig) -> None:
        if config.items is not None:
            name = f"{score_name}:{config.items}"
            loaded = {name: jsonl_task(name, config, self.suite.items)}
        else:
            assert config.lm_eval is not None  # TaskConfig
            loaded = lm_eval_tasks(config.lm_eval, self.suite)
        for name, task in loaded.items():
            if name in self._tasks:
                raise MergetuneError(f"{self.suite.path}: the task `{name}` is used twice; use it once.")
            self._tasks[name] = _bind(score_name, config, task, self.suite.config.holdout)

    def _check_splits(self) -> None:
        splits: list[Split] = ["search", "holdout"] if self.suite.config.holdout else ["search"]
        for name, bound in self._tasks.items():
            for split in splits:
                if (n_items := len(bound.indices(split))) < 2:
                    raise MergetuneError(
                        f"{self.suite.path}: a task needs two items in each split, for one has no spread, "
                        f"but `{name}` has {n_items} in the {split} split: {len(bound.item_ids)} items were "
                        f"split by `holdout: {self.suite.config.holdout}`. Add items, or change `holdout` or "
                        "`limit`."
                    )


def _bind(score_name: str, config: TaskConfig, task: Task, holdout: float) -> BoundTask:
    if config.num_fewshot is not None:
        task.set_config("num_fewshot", config.num_fewshot)
    n_shared = fix_fewshot(task)
    docs = list(task.eval_docs)[: config.limit]
    splits = [None if i < n_shared else split_of(_question(task, doc), holdout) for i, doc in enumerate(docs)]
    return BoundTask(score_name, config, task, tuple(_item_ids(docs)), tuple(splits))


def _settings(bound: BoundTask, chat_template: bool) -> str:
    """Write down how a task asks and scores, whichever its documents."""
    task = bound.task
    examples = list(task.fewshot_docs())[: task.config.num_fewshot] if task.config.num_fewshot else []
    data = {
        "suite": bound.config.model_dump(mode="json", exclude={"items", "limit", "fewshot_items"}),
        "task": task.dump_config() if bound.config.items is None else None,
        "version": [str(task.VERSION), *map(importlib.metadata.version, ("lm-eval", "mergetune"))],
        "examples": examples,
        "chat_template": chat_template,
    }
    return json.dumps(data, sort_keys=True, default=str)


def _prompt(task: Task, doc: Any) -> str:
    """Return the document's own part of the prompt."""
    text = task.doc_to_text(doc)
    return text if isinstance(text, str) else json.dumps(doc, sort_keys=True, default=str)


def _question(task: Task, doc: Any) -> str:
    """Return prompt and choices: what decides the split, so that one question in two tasks has one."""
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    return "\n".join([_prompt(task, doc), *map(str, choices)])


def _item_ids(docs: Sequence[Any]) -> list[str]:
    """Return an id per document from its content; repeated documents are numbered."""
    from lm_eval.utils import hash_string

    seen: dict[str, int] = {}
    ids = []
    for doc in docs:
        digest = hash_string(json.dumps(doc, sort_keys=True, default=str))[:16]
        seen[digest] = seen.get(digest, 0) + 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return ids


def _one_filter(samples: list[dict[str, Any]], chosen: str | None) -> list[dict[str, Any]]:
    """lm-eval gives a row per filter: keep one filter's, the first where none was chosen."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    if chosen is not None and chosen not in filters:
        raise MergetuneError(f"The task has no filter `{chosen}`.{nearest(chosen, filters)}")
    return [sample for sample in samples if sample["filter"] == (chosen or filters[0])]


def _row(bound: BoundTask, sample: dict[str, Any]) -> dict[str, Any]:
    metric = bound.config.metric or sample["metrics"][0]
    if metric not in sample:
        raise MergetuneError(
            f"The task `{bound.task.task_name}` has no metric `{metric}`.{nearest(metric, sample['metrics'])}"
        )
    score = sample[metric]
    if not isinstance(score, (int, float)):
        raise MergetuneError(
            f"`{metric}` of `{bound.task.task_name}` has no number per item, but {score!r}. "
            "Choose a metric that is a mean over items, such as `acc` or `exact_match`."
        )
    if not math.isfinite(score) or _has_nan(sample):
        raise TrialError(f"`{bound.task.task_name}`: the model's scores or log-likelihoods are NaN.")
    return {
        "score_name": bound.score_name,
        "task": bound.task.task_name,
        "item": bound.item_ids[sample["doc_id"]],
        "score": float(score),
        "response": _response(sample),
    }


def _has_nan(sample: dict[str, Any]) -> bool:
    """Say whether a log-likelihood is NaN: the likeliest choice would then be the first one."""
    return any(isinstance(reply, tuple) and math.isnan(reply[0]) for reply in sample["filtered_resps"])


def _response(sample: dict[str, Any]) -> str:
    """Return what the model said: its reply, or the likeliest of the choices."""
    replies = sample["filtered_resps"]
    if isinstance(replies[0], str):
        return replies[0]
    if isinstance(replies[0], tuple):
        best = max(range(len(replies)), key=lambda i: replies[i][0])
        return str(sample["arguments"][best][1]).strip()
    return str(replies[0])


def _target_text(bound: BoundTask, doc: Any) -> str:
    """Return what an item asks for in words: its answer, or the patterns that its score counts."""
    task, scorer = bound.task, bound.config.scorer
    if scorer is not None and scorer.kind == "regex":
        return "\n".join(["the share met of these patterns:", *scorer.patterns, *item_patterns(doc)])
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        return str(task.doc_to_choice(doc)[target])
    return str(target)


def _mean_over_tasks(rows: pd.DataFrame) -> Score:
    """Mean of the tasks' means; standard error of that mean, the tasks being strata.

    It is infinite where a task has a single item.
    """
    by_task = rows.groupby("task")["score"].agg(["mean", "var", "size"])
    variance = (by_task["var"].fillna(math.inf) / by_task["size"]).sum() / len(by_task) ** 2
    return Score(float(by_task["mean"].mean()), math.sqrt(variance), len(rows))
