"""Which way metrics go, asked of lm-eval's own and of made-up ones."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, cast

import pytest
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import is_higher_better
from lm_eval.api.task import ConfigurableTask

from mergetune.evaluation.bound_task import BoundTask, bind
from mergetune.evaluation.lm_requests import make_requests
from mergetune.evaluation.metric_direction import NamedTexts, reply_scores, rise_with_likelihood
from mergetune.evaluation.suite import SuiteConfig, TaskConfig

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Is {i} odd?", "answer": i % 2, "text": f"{i} is a number."} for i in range(50)
]
SUITE = SuiteConfig.model_validate(
    {"description": "x", "chat_template": False, "objectives": {"o": {"tasks": [{"lm_eval": "own"}]}}}
)


def task_of(output_type: str, metric: str, **changes: Any) -> BoundTask:
    """A task of 50 documents."""
    config: dict[str, Any] = {
        "task": "own",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(ROWS)},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "prompt",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": [{"metric": metric}],
    }
    if output_type == "multiple_choice":
        config |= {"doc_to_choice": ["No", "Yes, it is"], "doc_to_target": "answer"}
    task = ConfigurableTask(config={**config, **changes})
    return bind("own", "o", TaskConfig(lm_eval="own", metric=metric), task, SUITE)


def requests_of(bound: BoundTask) -> dict[int, list[Instance]]:
    return make_requests(bound, range(len(ROWS)), cast(LM, None), SUITE)


def named_of(bound: BoundTask) -> list[NamedTexts]:
    asked = requests_of(bound)
    if bound.task.OUTPUT_TYPE != "multiple_choice":
        return [NamedTexts(index, own, 1, (0,)) for index, own in asked.items()]
    return [NamedTexts(index, own, 2, (ROWS[index]["answer"],)) for index, own in asked.items()]


@pytest.mark.parametrize(
    ("output_type", "metric"),
    [
        ("multiple_choice", "acc"),
        ("multiple_choice", "acc_norm"),
        ("multiple_choice", "acc_bytes"),
        ("multiple_choice", "acc_mutual_info"),
        ("multiple_choice", "f1"),
        ("multiple_choice", "mcc"),
        ("multiple_choice", "brier_score"),
        ("loglikelihood", "acc"),
        ("loglikelihood", "perplexity"),
        ("loglikelihood_rolling", "word_perplexity"),
        ("loglikelihood_rolling", "byte_perplexity"),
        ("loglikelihood_rolling", "bits_per_byte"),
    ],
)
def test_metrics_that_lm_eval_wants_high_rise_with_the_right_text_and_the_others_fall(
    output_type: str, metric: str
) -> None:
    bound = task_of(output_type, metric)
    assert rise_with_likelihood(bound, named_of(bound)) == (1 if is_higher_better(metric) else -1)


def difference(_doc: Any, results: Any) -> dict[str, float]:
    (first, _), (second, _) = results
    return {"own": abs(first - second)}


def preference(_doc: Any, results: Any) -> dict[str, float]:
    (first, _), (second, _) = results
    return {"own": float(first > second)}


def share_wrong(doc: Any, results: Any) -> dict[str, float]:
    likeliest = max(range(2), key=lambda k: results[k][0])
    return {"own": float(likeliest != doc["answer"])}


def broken(_doc: Any, results: Any) -> dict[str, float]:
    return {"own": results[2][0]}


@pytest.mark.parametrize(
    ("process_results", "rises"), [(difference, 0), (preference, 0), (share_wrong, -1), (broken, 0)]
)
def test_a_metric_of_a_tasks_own_is_asked(process_results: Any, rises: int) -> None:
    """One that goes both ways, not at all, or has no value says nothing of the right choice."""
    own = [{"metric": "own", "aggregation": "mean", "higher_is_better": True}]
    bound = task_of("multiple_choice", "own", metric_list=own, process_results=process_results)
    assert rise_with_likelihood(bound, named_of(bound)) == rises


def wrong_letters(doc: Any, results: Any) -> dict[str, float]:
    return {"own": sum(a != b for a, b in zip_longest(doc["text"], results[0])) / len(doc["text"])}


def test_replies_are_scored_as_a_models_are() -> None:
    own = [{"metric": "own", "aggregation": "mean", "higher_is_better": False}]
    settings = {"generation_kwargs": {"until": ["\n"]}, "process_results": wrong_letters}
    bound = task_of("generate_until", "own", metric_list=own, **settings)
    asked = requests_of(bound)
    assert reply_scores(bound, asked, {index: ROWS[index]["text"] for index in (0, 3)}) == {0: 0.0, 3: 0.0}
    assert reply_scores(bound, asked, {7: ""}) == {7: 1.0}
