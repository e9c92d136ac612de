"""Tasks in their place in a suite: what is asked, in which split, and which metric is taken."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.aggregations import Aggregation, aggregation_of, by_name
from mergetune.evaluation.fields import MISSING, at_path
from mergetune.evaluation.item_scores import explained, item_scores, numbered
from mergetune.evaluation.items import Item
from mergetune.evaluation.lm_requests import filter_names
from mergetune.evaluation.lm_tasks import METADATA, code_eval_allowed, fix_fewshot, item_of
from mergetune.evaluation.rules import rules_digest
from mergetune.evaluation.scorers.scorer import text_of
from mergetune.evaluation.suite import (
    CODE_RUNS,
    Direction,
    ScoreConfig,
    Split,
    SuiteConfig,
    TaskConfig,
    split_of,
)
from mergetune.files.yaml_io import nearest

if TYPE_CHECKING:
    import pandas as pd
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

UNJUDGED = "unjudged"  # the column that counts an item's replies on which a judge gave no verdict
REASON = "reason"  # the column of what a judge wrote; empty where none did
_LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")


@dataclass(frozen=True)
class BoundTask:
    """An lm-eval task in its place in the suite, with its documents.

    Attributes:
        name: the task's name in the suite, its own for each score that it is in.
        metric: what is taken of all that it measures, as `filter` gives it.
        docs: the documents, in the task's order; so are `item_ids` and `splits`.
        splits: None is that of a few-shot example, in no split.
        rules: a digest of how its items are asked and scored.
    """

    name: str
    score_name: str
    config: TaskConfig
    task: Task
    metric: str
    filter: str
    aggregation: Aggregation
    docs: tuple[Any, ...]
    item_ids: tuple[str, ...]
    splits: tuple[Split | None, ...]
    rules: str

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The items that a JSONL task's documents were made of, read from these once."""
        return tuple(map(item_of, self.docs))

    def indices(self, split: Split) -> list[int]:
        """Return the documents of a split."""
        return [index for index, own in enumerate(self.splits) if own == split]

    def prompt(self, index: int) -> str:
        """Return a document's own part of the prompt."""
        return _prompt(self.task, self.docs[index])

    def system(self, index: int) -> str:
        """Return the system message that a document is asked under; empty: none."""
        return "" if self.config.scorer is None else self.docs[index]["system"] or ""

    def earlier(self, index: int) -> list[str]:
        """Return what the user says in a conversation before the prompt."""
        if self.config.scorer is None:
            return []
        said = [message.content for message in self.items[index].messages if message.role == "user"]
        return said[:-1]

    def target(self, index: int) -> str:
        """Return what an item asks for in words: its answer, or what its score counts."""
        scorer = self.config.scorer
        if scorer is None:
            return str(right_answer(self.task, self.docs[index]))
        return scorer.target_text(self.items[index])

    def slices(self, index: int, keys: Sequence[str]) -> dict[str, str]:
        """Return a document's value of each slice, as text; those that it does not have are left out."""
        data = self.docs[index] if self.config.scorer is None else self.items[index].metadata
        found = {key: at_path(data, key) for key in keys}
        return {key: text_of(value) for key, value in found.items() if value is not MISSING}

    def measured(self, results: Mapping[int, Sequence[Any]]) -> dict[int, Mapping[str, Any]]:
        """Return what the task measures of each document's replies, as its filter left them, by metric.

        Of JSONL items it says, too, on how many replies a judge gave no verdict, if there are any, and what
        it wrote of the others.

        Raises:
            MergetuneError: an item cannot be scored.
        """
        if self.config.scorer is None:
            with code_eval_allowed(_runs_code(self.task)):
                return {i: self.task.process_results(self.docs[i], list(own)) for i, own in results.items()}
        scores = item_scores(self.config, [self.items[i] for i in results], results.values())
        return {
            i: {
                self.metric: own.value,
                **({UNJUDGED: own.n_unjudged} if own.n_unjudged else {}),
                **({REASON: own.reason} if own.reason else {}),
            }
            for i, own in zip(results, scores, strict=True)
        }

    def rescored(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Score the replies in rows of an earlier measurement by the scorer that the task has now.

        Raises:
            MergetuneError: the rows do not hold one reply for each item.
        """
        scorer, config = self.config.scorer, self.config
        if scorer is None or scorer.asks != "reply" or config.repeats > 1 or config.score_turns != "last":
            raise MergetuneError(
                f"`{self.name}` is scored otherwise now, and only single replies can be scored anew from a "
                "measurement. Measure the model again."
            )
        place = {item: index for index, item in enumerate(self.item_ids)}
        items = [self.items[place[item]] for item in rows["item"]]
        scored = explained(scorer, items, rows["response"].astype(str).tolist())
        return rows.assign(
            score=[each.score for each in scored],
            parts=None,
            aggregation="mean",
            unjudged=[int(math.isnan(each.score)) for each in scored],
            reason=[each.reason for each in scored],
            rules=self.rules,
        )

    def rows(
        self, requests: Mapping[int, Sequence[Instance]], results: Mapping[int, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """Score documents' replies, as the task's filter left them, as rows of a measurement.

        Raises:
            TrialError: a log-likelihood is NaN.
            MergetuneError: an item cannot be scored, or the metric has no number.
        """
        for index, own in results.items():
            if any(request.doc_id != index for request in requests[index]):
                raise MergetuneError(
                    f"`{self.name}`: a reply came back for another item than it was asked for."
                )
            if any(isinstance(each, tuple) and math.isnan(each[0]) for each in own):
                raise TrialError(f"`{self.name}`: the model's scores or log-likelihoods are NaN.")
        measured = self.measured(results)
        return [
            {
                "score_name": self.score_name,
                "task": self.name,
                "item": self.item_ids[index],
                **self._scored(measured[index]),
                "response": _response(requests[index], own),
                REASON: "" if self.config.scorer is None else measured[index].get(REASON, ""),
                "rules": self.rules,
            }
            for index, own in results.items()
        ]

    def _scored(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's score and how it goes into the task's.

        An item without any verdict is missing from a mean: its score is NaN. (Where an lm-eval task has
        no value for an item by design, that is a part of the metric; see `aggregations`.)
        """
        n_unjudged = 0 if self.config.scorer is None else measured.get(UNJUDGED, 0)
        if n_unjudged and math.isnan(measured[self.metric]):
            return {"score": math.nan, "aggregation": "mean", "parts": None, UNJUDGED: n_unjudged}
        # as in lm-eval, what the task gives no value for is left out of a mean
        is_left_out = self.metric not in measured and self.aggregation.name == "mean"
        aggregation = by_name("nanmean") if is_left_out else self.aggregation
        score, parts = self._value(measured.get(self.metric, math.nan), aggregation)
        return {"score": score, "aggregation": aggregation.name, "parts": parts, UNJUDGED: n_unjudged}

    def _value(self, value: Any, aggregation: Aggregation) -> tuple[float, list[float] | None]:
        """Return the score of one item and its parts; None where the metric is the mean of the scores."""
        try:
            parts = aggregation.parts(value)
            score = aggregation.of_one(value, parts)
        except (TypeError, ValueError) as error:
            raise MergetuneError(
                f"`{self.metric}` of `{self.task.task_name}` must have a number per item, but has {value!r}. "
                f"Choose another of its metrics: {', '.join(self.task.aggregation())}."
            ) from error
        if not all(map(math.isfinite, parts)):
            raise TrialError(f"`{self.name}`: the model's scores or log-likelihoods are NaN.")
        return score, None if aggregation.name == "mean" else list(parts)


def bind(name: str, score_name: str, config: TaskConfig, task: Task, suite: SuiteConfig) -> BoundTask:
    """Put a task into its place.

    Raises:
        MergetuneError: it has no such metric or filter, none that can be judged by items, it would run
            code, which the suite does not allow, or it would show pictures.
    """
    _check_kind(task, suite)
    metric, chosen_filter = _metric(task, config), _filter(task, config)
    if config.num_fewshot is not None:
        task.set_config("num_fewshot", config.num_fewshot)
    docs = tuple(task.eval_docs)[: config.limit]
    n_shared = fix_fewshot(task, docs)
    is_content_alone = config.scorer is not None and not config.scorer.reads_metadata
    ids = _item_ids([_content(doc) for doc in docs] if is_content_alone else docs)
    splits = tuple(
        None if index < n_shared else split_of(question, suite.holdout)
        for index, question in enumerate(_questions(task, docs, ids))
    )
    aggregation = aggregation_of(task, metric)
    rules = rules_digest(task, config, suite, metric)
    bound = BoundTask(
        name, score_name, config, task, metric, chosen_filter, aggregation, docs, ids, splits, rules
    )
    _try_metric(bound)
    return bound


def direction_of(name: str, score: ScoreConfig, tasks: Sequence[BoundTask]) -> Direction:
    """Settle a score's direction: what the suite says, else what its lm-eval tasks say.

    Raises:
        MergetuneError: its tasks do not agree, or the suite says the contrary and not that it means it.
    """
    said: dict[Direction, list[str]] = {}
    for bound in tasks:
        if (own := _better(bound)) is not None:
            said.setdefault(own, []).append(f"`{bound.metric}` of `{bound.task.task_name}`")
    if score.direction is None and len(said) > 1:
        raise MergetuneError(
            f"`{name}`: its tasks must agree on what is better, but {said['maximize'][0]} is better when "
            f"high, and {said['minimize'][0]} when low. Make two objectives of them."
        )
    if score.direction is None:
        return next(iter(said), "maximize")
    contrary: Direction = "minimize" if score.direction == "maximize" else "maximize"
    if contrary in said and not score.against_task:
        better = "high" if contrary == "maximize" else "low"
        raise MergetuneError(
            f"`{name}.direction`: must be what the task says, but is `{score.direction}`, and "
            f"{said[contrary][0]} is better when {better}. Leave `direction` out; where the contrary is "
            "meant, as in unlearning a skill, say `against_task: true`."
        )
    return score.direction


def right_answer(task: Task, doc: Any) -> Any:
    """Return what a document asks for: the text of the right choice, or the target as the task has it."""
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        return task.doc_to_choice(doc)[target]
    return target


def _item_ids(docs: Sequence[Any]) -> tuple[str, ...]:
    """Return an id per document from its content; repeated documents are numbered."""
    from lm_eval.utils import hash_string

    seen: Counter[str] = Counter()
    ids = []
    for doc in docs:
        digest = hash_string(_as_text(doc))[:16]
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return tuple(ids)


def _content(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a document of a JSONL task asks and wants."""
    return {name: value for name, value in doc.items() if name != METADATA}


def _check_kind(task: Task, suite: SuiteConfig) -> None:
    if _runs_code(task) and not suite.allow_code_execution:
        raise MergetuneError(f"The task `{task.task_name}` would {CODE_RUNS}.")
    if getattr(task, "MULTIMODAL", False):
        raise MergetuneError(
            f"The task `{task.task_name}` would show pictures or sound, which mergetune does not. "
            "Take another task."
        )


def _runs_code(task: Task) -> bool:
    return getattr(task, "UNSAFE_CODE", False)


def _metric(task: Task, config: TaskConfig) -> str:
    metrics = list(task.aggregation())
    wanted = config.metric or metrics[0]
    if wanted in metrics:
        return wanted
    name, _, its_filter = wanted.partition(",")
    if its_filter and name in metrics:
        hint = f" lm-eval writes `metric,filter`: here say `metric: {name}` and `filter: {its_filter}`."
    else:
        hint = nearest(wanted, metrics)
    raise MergetuneError(f"The task `{task.task_name}` has no metric `{wanted}`.{hint}")


def _filter(task: Task, config: TaskConfig) -> str:
    filters = filter_names(task)
    if config.filter is not None and config.filter not in filters:
        raise MergetuneError(
            f"The task `{task.task_name}` has no filter `{config.filter}`.{nearest(config.filter, filters)}"
        )
    return config.filter or filters[0]


def _try_metric(bound: BoundTask) -> None:
    """Score made-up log-likelihoods: a metric without a number per item is refused before any work."""
    if bound.config.items is not None or bound.task.OUTPUT_TYPE not in _LIKELIHOODS or not bound.docs:
        return
    is_rolling = bound.task.OUTPUT_TYPE == "loglikelihood_rolling"
    try:
        made = bound.task.construct_requests(doc=bound.docs[0], ctx="", metadata=(bound.name, 0, 1))
        n_replies = len(made) if isinstance(made, list) else 1
        replies = [-1.0 - n if is_rolling else (-1.0 - n, False) for n in range(n_replies)]
        scores = bound.measured({0: replies})[0]
    except Exception:  # whatever a task's own code raises at replies that no model gave
        return
    if bound.metric in scores:
        bound._value(scores[bound.metric], bound.aggregation)


def _better(bound: BoundTask) -> Direction | None:
    """Return what the task says of its metric; None where it says nothing.

    Of items' scores only costs say it: how often a reply has what a scorer looks for may be wanted or not.
    """
    if bound.config.scorer is not None and bound.config.scorer.higher_is_better:
        return None
    is_high = bound.task.higher_is_better().get(bound.metric)
    if is_high is None:
        return None
    return "maximize" if is_high else "minimize"


def _questions(task: Task, docs: Sequence[Any], ids: Sequence[str]) -> list[str]:
    """Return what decides each document's split: prompt and choices, so that one question has one split.

    Where these do not tell most documents apart, as in language modelling, the whole document decides.
    """
    questions = [_question(task, doc) for doc in docs]
    if 2 * len(set(questions)) < len(set(ids)):
        return [_as_text(doc) for doc in docs]
    return [each if each.strip() else _as_text(doc) for each, doc in zip(questions, docs, strict=True)]


def _question(task: Task, doc: Any) -> str:
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    return "\n".join([_prompt(task, doc), *map(str, choices)])


def _prompt(task: Task, doc: Any) -> str:
    text = task.doc_to_text(doc)
    return text if isinstance(text, str) else _as_text(doc)


def _as_text(doc: Any) -> str:
    return json.dumps(doc, sort_keys=True, default=str)


def _response(requests: Sequence[Instance], results: Sequence[Any]) -> str:
    """Return what the model said: its replies, how long they took, or the likeliest of the choices."""
    kind = requests[0].request_type
    if kind == "reply_seconds":
        return numbered([f"{seconds:.3g} s" for seconds in results])
    if kind == "generate_until":
        pairs = zip(requests, results, strict=True)
        return numbered([own if isinstance(own, str) else str(request.resps[0]) for request, own in pairs])
    if isinstance(results[0], tuple):
        best = max(range(len(results)), key=lambda i: results[i][0])
        return str(requests[best].args[1]).strip()
    return str(results[0])
