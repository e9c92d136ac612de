"""Evaluate a model on a suite through lm-eval; every score is kept per item."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from mergetune.errors import MergetuneError
from mergetune.evaluation.aggregations import linear_scores
from mergetune.evaluation.bound_task import REASON, UNJUDGED, BoundTask, bind, direction_of
from mergetune.evaluation.judging.agreement import Agreement
from mergetune.evaluation.lm_requests import ask, filtered, make_requests, spoken
from mergetune.evaluation.lm_tasks import jsonl_task, lm_eval_tasks
from mergetune.evaluation.scorers import JudgeScorer
from mergetune.evaluation.suite import ScoreConfig, Split, Suite, SuiteConfig, TaskConfig
from mergetune.machine import clock
from mergetune.machine.sandbox import is_isolated

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

Documents = Mapping[str, Sequence[int]]  # by task, indices of its documents
Requests = dict[str, dict[int, "list[Instance]"]]  # by task and document
ITEM_KEYS = ["score_name", "task", "item"]  # the columns that name a row of a measurement
COLUMNS = [*ITEM_KEYS, "score", "response", "aggregation", "parts", UNJUDGED, REASON, "rules"]  # all of them


@dataclass(frozen=True)
class Score:
    """A mean score with its standard error and the number of items behind it."""

    value: float
    stderr: float
    n_items: int

    @property
    def is_unanimous(self) -> bool:
        """Say whether all items agree; one alone has no spread, and says nothing of it."""
        return self.n_items > 1 and self.stderr == 0


@dataclass(frozen=True)
class Measurement:
    """The per-item scores of one model on one split of a suite, and what they cost.

    `items` has a row per item: `score_name` (objective or guard), `task`, `item` (an id that depends
    on the content only), `score` (NaN where the metric has no value for this item by design, or a judge gave
    no verdict), `response`, `unjudged` (on how many of the item's replies a judge gave none), `reason` (what
    a judge wrote of them), `rules` (a digest of how the item was asked and scored) and, where the task's
    metric is no mean of scores, the `parts` that its `aggregation` takes; see `aggregations`.
    """

    items: pd.DataFrame
    seconds: float

    def scores(self) -> dict[str, Score]:
        """Return each objective's and guard's mean over its tasks of their metrics.

        Items without a verdict count in no mean; a score is left out where no item has one.
        """
        rows = linear_scores(self.items).assign(has_value=self.items["score"].notna())
        rows = rows[rows["score"].notna()]
        return {str(name): _mean_over_tasks(own) for name, own in rows.groupby("score_name", sort=False)}


class Evaluator:
    """A suite made ready once a study: its lm-eval tasks are built and its items split.

    Its `suite` has every direction settled.

    Raises:
        MergetuneError: a task is unknown, its data cannot be had, or it has fewer than two items in a split;
            or a metric, a filter or a direction does not fit its task.
    """

    def __init__(self, suite: Suite) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            self._tasks = {bound.name: bound for bound in _bound_tasks(suite)}
            config = _settled(suite.config, list(self._tasks.values()))
        except MergetuneError as error:
            raise MergetuneError(f"{suite.path}: {error}") from error
        self.suite = replace(suite, config=config)
        self._check_splits()
        # By what renders the prompts: these do not depend on the weights.
        self._requests: weakref.WeakKeyDictionary[object, Requests] = weakref.WeakKeyDictionary()

    @property
    def tasks(self) -> dict[str, BoundTask]:
        """The tasks by name, each in its place in the suite."""
        return self._tasks

    @property
    def rules(self) -> str:
        """A digest of everything that makes a score, beside the items, the model and its engine."""
        rules = {name: [bound.score_name, bound.rules] for name, bound in self._tasks.items()}
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be known before replies are scored."""
        scorers = [bound.config.scorer for bound in self._tasks.values()]
        if any(scorer is not None and scorer.runs_code for scorer in scorers) and not is_isolated():
            return (
                "the code in replies runs without namespaces, which this user cannot make here: its time, "
                "memory, processes and files are limited, but it reaches the network and this user's files.",
            )
        return ()

    @property
    def agreements(self) -> dict[str, dict[str, Agreement]]:
        """How far judges agree with people, by score and task, of those that have scored a reply."""
        found: dict[str, dict[str, Agreement]] = {}
        for name, bound in self._tasks.items():
            scorer = bound.config.scorer
            if isinstance(scorer, JudgeScorer) and scorer.agreement is not None:
                found.setdefault(bound.score_name, {})[name] = scorer.agreement
        return found

    def count(self, split: Split) -> int:
        """Count the items of a split."""
        return sum(len(bound.indices(split)) for bound in self._tasks.values())

    def documents(self, split: Split | Literal["all"]) -> Documents:
        """Return the documents of a split, or of both, in ascending order."""
        splits: list[Split] = ["search", "holdout"] if split == "all" else [split]
        return {
            name: sorted(index for each in splits for index in bound.indices(each))
            for name, bound in self._tasks.items()
        }

    def measure(self, lm: LM, split: Split) -> Measurement:
        """Score a model on every item of a split; see `measure_documents`."""
        return self.measure_documents(lm, self.documents(split))

    def measure_documents(self, lm: LM, documents: Documents) -> Measurement:
        """Score a model on some of the items; rows come in the suite's order, whichever order was given.

        Raises:
            TrialError: a score is not a finite number.
            MergetuneError: a prompt does not fit the model, or a metric has no number.
        """
        start = clock.seconds()
        requests = self.requests(lm, documents)
        ask(lm, [request for own in requests.values() for each in own.values() for request in each])
        rows = [
            row
            for bound, own in ((self._tasks[name], own) for name, own in requests.items())
            for row in bound.rows(own, self._results(bound, own, lm))
        ]
        return Measurement(pd.DataFrame(rows, columns=COLUMNS), clock.seconds() - start)

    def _results(
        self, bound: BoundTask, requests: Mapping[int, Sequence[Instance]], lm: LM
    ) -> Mapping[int, Sequence[Any]]:
        """Return what is scored of the replies, by document."""
        if bound.config.scorer is not None and bound.config.scorer.asks == "tokens":
            count = getattr(lm, "renderer", lm).count_tokens
            return {index: [count(each.resps[0]) for each in own] for index, own in requests.items()}
        return filtered(bound, spoken(requests, self.suite.config))

    def requests(self, lm: LM, documents: Documents) -> Requests:
        """Return what is asked of a model, by task and document, both in the suite's order.

        Raises:
            MergetuneError: prompts do not fit the model, and the suite does not say to cut them off.
        """
        known = self._requests.setdefault(getattr(lm, "renderer", lm), {name: {} for name in self._tasks})
        wanted = {name: sorted(set(documents[name])) for name in self._tasks if documents.get(name)}
        lm.truncate = self.suite.config.truncate
        new: Requests = {}
        for name, indices in wanted.items():
            bound, unknown = self._tasks[name], [index for index in indices if index not in known[name]]
            new[name] = make_requests(bound, unknown, lm, self.suite.config)
        if self.suite.config.truncate == "refuse":
            self._check_lengths(lm, new)
        for name, own in new.items():
            known[name] |= own
        return {name: {index: known[name][index] for index in own} for name, own in wanted.items()}

    def count_sent(self, renderer: object) -> int:
        """Count the items that models were sent so far; see `sent`."""
        return sum(map(len, self._requests.get(renderer, {}).values()))

    def sent(self, renderer: object) -> pd.DataFrame:
        """Return what models were sent so far, by item: `sent` is the last request's prompt, as rendered.

        Args:
            renderer: what rendered it: the `renderer` of the models, or these themselves.
        """
        rows = [
            {
                "score_name": bound.score_name,
                "task": name,
                "item": bound.item_ids[index],
                "sent": str(own[-1].args[0]),
            }
            for name, bound in self._tasks.items()
            for index, own in self._requests.get(renderer, {}).get(name, {}).items()
        ]
        return pd.DataFrame(rows, columns=[*ITEM_KEYS, "sent"])

    def items(self) -> pd.DataFrame:
        """Return a row per item of the suite: its id, its place, its split, what is asked, and the target.

        `prompt` is the last that the user says, `earlier` lists what the user says before it, as JSON, and
        `system` is the system message.

        Where the suite has slices, `slices` holds their values as JSON.
        """
        keys = self.suite.config.slices
        rows = [
            {
                "score_name": bound.score_name,
                "task": name,
                "item": bound.item_ids[index],
                "split": split,
                "system": bound.system(index),
                "earlier": json.dumps(bound.earlier(index), ensure_ascii=False),
                "prompt": bound.prompt(index),
                "target": bound.target(index),
                **({"slices": json.dumps(bound.slices(index, keys), ensure_ascii=False)} if keys else {}),
            }
            for name, bound in self._tasks.items()
            for index, split in enumerate(bound.splits)
            if split is not None
        ]
        return pd.DataFrame(rows)

    def _check_lengths(self, lm: LM, requests: Requests) -> None:
        excess_tokens = getattr(lm, "excess_tokens", None)  # lm-eval's own models have none
        if excess_tokens is None:
            return
        long = {
            name: [most for own in asked.values() if (most := max(map(excess_tokens, own))) > 0]
            for name, asked in requests.items()
        }
        if said := [
            f"{len(own)} of {len(requests[name])} items of `{name}` (by up to {max(own)} tokens)"
            for name, own in long.items()
            if own
        ]:
            raise MergetuneError(
                f"{self.suite.path}: every prompt and its reply must fit the model's length, "
                f"{lm.max_length} tokens, but these are longer: {', '.join(said)}. Shorten them, give the "
                "engine a greater `max_length` if the model has one, or say `truncate: left` in the suite, "
                "which cuts off the beginnings of prompts."
            )

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


def paired(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Join two measurements item by item; `score` becomes the difference `own` − `score_other`.

    Pairs of which a judge gave no verdict on one or both are left out.
    """
    both = linear_scores(first).merge(linear_scores(second), on=ITEM_KEYS, suffixes=("", "_other"))
    both = both.assign(own=both["score"], score=both["score"] - both["score_other"])
    return both[both["score"].notna()]


def rules_of(items: pd.DataFrame) -> dict[str, str]:
    """Return the digest of the rules by task; empty where an earlier version kept none."""
    return dict(items.groupby("task")["rules"].first()) if "rules" in items else {}


def _bound_tasks(suite: Suite) -> Iterator[BoundTask]:
    """Build every task of a suite, each with a name of its own."""
    found = [
        (score_name, config, task)
        for score_name, score in suite.config.scores.items()
        for config in score.tasks
        for task in _load(score_name, config, suite)
    ]
    uses = Counter(task.task_name for _, _, task in found)
    names: set[str] = set()
    for score_name, config, task in found:
        name = str(task.task_name)
        if uses[name] > 1:  # one task may be scored by several metrics, or stand in several scores
            of = config.metric or (config.scorer.kind if config.scorer else None)
            name = ":".join(
                filter(None, (score_name, name.removeprefix(f"{score_name}:"), of, config.filter))
            )
        if name in names:
            raise MergetuneError(f"The task `{name}` is used twice; use it once.")
        names.add(name)
        yield bind(name, score_name, config, task, suite.config)


def _load(score_name: str, config: TaskConfig, suite: Suite) -> list[Task]:
    if config.source is not None:
        return [jsonl_task(f"{score_name}:{config.source.name}", config, suite.items)]
    assert config.lm_eval is not None  # TaskConfig
    return list(lm_eval_tasks(config.lm_eval, suite).values())


def _settled(config: SuiteConfig, tasks: Sequence[BoundTask]) -> SuiteConfig:
    """Return the suite's file with every direction settled."""

    def settled(scores: Mapping[str, ScoreConfig]) -> dict[str, ScoreConfig]:
        return {
            name: score.model_copy(
                update={"direction": direction_of(name, score, [t for t in tasks if t.score_name == name])}
            )
            for name, score in scores.items()
        }

    parts = {"objectives": settled(config.objectives), "guards": settled(config.guards)}
    return config.model_copy(update=parts)


def _mean_over_tasks(rows: pd.DataFrame) -> Score:
    """Mean of the tasks' means; standard error of that mean, the tasks being strata.

    The error is infinite where a task has a single item. The mean has the twelve digits that count, so that
    equal scores are equal, whatever the order they were added up in.
    """
    by_task = rows.groupby("task")["score"].agg(["mean", "var", "size"])
    variance = (by_task["var"].fillna(math.inf) / by_task["size"]).sum() / len(by_task) ** 2
    mean = float(f"{by_task['mean'].mean():.12g}")
    return Score(mean, math.sqrt(variance), int(rows["has_value"].sum()))
