"""Every score belongs to its item and every metric is lm-eval's own, by plain loops and by lm-eval itself."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from helpers import plain_loop
from mergetune.engines.engine import Engine, EngineConfig
from mergetune.engines.start import start_engine
from mergetune.errors import MergetuneError
from mergetune.evaluation.aggregations import KNOWN, linear_scores
from mergetune.evaluation.evaluate import ITEM_KEYS, Evaluator, Measurement
from mergetune.evaluation.rules import are_asked_alike
from mergetune.evaluation.suite import read_suite
from mergetune.stats.resampling import bootstrap_parts, join_items


class EvenLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """Says the number that it is asked for if that is even, else nothing."""

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        numbers = [int(request.args[0].split()[-1]) for request in requests]
        return [str(number) if number % 2 == 0 else "" for number in numbers]

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        return [-float(len(request.args[0])) for request in requests]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> None:
    """Write an lm-eval task over these rows; in `process_results` and aggregations `!function` may stand."""
    write_lines(folder / f"{name}.rows.jsonl", rows)
    files = {"data_files": {"test": str(folder / f"{name}.rows.jsonl")}}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **config}
    text = re.sub(r"'(!function \S+)'", r"\1", yaml.safe_dump(task))
    (folder / f"{name}.yaml").write_text(text)


def make(folder: Path, objectives: dict[str, Any], **changes: Any) -> Evaluator:
    suite = {"description": "x", "chat_template": False, "holdout": 0.0, "include_path": ".", **changes}
    scores = {
        name: one if isinstance(one, dict) and "tasks" in one else {"tasks": [one]}
        for name, one in objectives.items()
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump({**suite, "objectives": scores}))
    return Evaluator(read_suite(folder / "suite.yaml"))


def by_item(frame: pd.DataFrame) -> dict[tuple[str, ...], tuple[float, str]]:
    values = frame[[*ITEM_KEYS, "score", "response"]].itertuples(index=False, name=None)
    return {(name, task, item): (score, reply) for name, task, item, score, reply in values}


@pytest.fixture
def counting(tmp_path: Path) -> Evaluator:
    write_lines(tmp_path / "say.jsonl", [{"prompt": f"say {i}", "answer": str(i)} for i in range(12)])
    task = {"items": "say.jsonl", "scorer": "exact", "max_new_tokens": 4}
    return make(tmp_path, {"say": task}, holdout=0.5)


def test_scores_stand_on_their_items_in_any_order(counting: Evaluator) -> None:
    lm, name = EvenLM(), "say:say.jsonl"
    prompts = {row["item"]: row["prompt"] for row in counting.items().to_dict("records")}
    orders = [counting.documents("all")[name], list(reversed(range(12)))]
    orders += [random.Random(seed).sample(range(12), 12) for seed in range(5)]
    for order in orders:
        found = counting.measure_documents(lm, {name: order}).items
        assert len(found) == 12
        for row in found.to_dict("records"):
            number = int(prompts[row["item"]].split()[-1])
            right = str(number) if number % 2 == 0 else ""
            assert (row["response"], row["score"]) == (right, float(number % 2 == 0))


def test_a_part_of_the_items_has_the_scores_of_the_whole(counting: Evaluator) -> None:
    lm, name = EvenLM(), "say:say.jsonl"
    whole = by_item(counting.measure_documents(lm, {name: list(range(12))}).items)
    part = by_item(counting.measure_documents(lm, {name: [7, 3, 11]}).items)
    assert len(part) == 3
    assert part.items() <= whole.items()


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[Engine]:
    engine = start_engine(EngineConfig(kind="transformers", batch_size=8), tiny_base)
    yield engine
    engine.close()


def test_the_table_is_that_of_a_plain_loop(tmp_path: Path, engine: Any) -> None:
    """A dozen lines with the model alone, without lm-eval, give the same replies and scores by item."""
    asked = [f"Say {'again ' * (i % 5)}number {i}." for i in range(14)]
    choices = [" Yes", " no, never"]
    said, likeliest = plain_loop(engine.model, engine.lm.tokenizer, asked, choices, max_new_tokens=5)
    replies = dict(zip(asked, said, strict=True))
    answers = [reply if i % 3 else "nothing like it" for i, reply in enumerate(replies.values())]
    write_lines(
        tmp_path / "say.jsonl", [{"prompt": p, "answer": a} for p, a in zip(asked, answers, strict=True)]
    )
    rows = [
        {"prompt": p, "choices": [c.strip() for c in choices], "answer": i % 2} for i, p in enumerate(asked)
    ]
    write_lines(tmp_path / "pick.jsonl", rows)
    say = {"items": "say.jsonl", "scorer": "exact", "max_new_tokens": 5}
    ready = make(tmp_path, {"say": say, "pick": {"items": "pick.jsonl", "scorer": "choice"}}, holdout=0.4)
    table = ready.items().merge(
        pd.concat([ready.measure(engine.lm, "holdout").items, ready.measure(engine.lm, "search").items]),
        on=ITEM_KEYS,
    )
    assert len(table) == 28
    for row in table.to_dict("records"):
        i = asked.index(row["prompt"])
        if row["score_name"] == "say":
            expected = replies[row["prompt"]].strip() == answers[i].strip()
            assert row["response"].strip() == replies[row["prompt"]].strip()
        else:
            expected = likeliest[i] == i % 2
            assert row["response"] == choices[likeliest[i]].strip()
        assert row["score"] == float(expected)


@pytest.mark.parametrize("end", [" ", "\n"])
def test_no_second_space_stands_before_a_choice(tmp_path: Path, engine: Any, end: str) -> None:
    asked = [f"Say {'again ' * (i % 5)}number {i}." for i in range(14)]
    choices = list("abcdefgh")
    rows = [{"prompt": prompt + end, "choices": choices, "answer": 0} for prompt in asked]
    write_lines(tmp_path / "pick.jsonl", rows)
    ready = make(tmp_path, {"pick": {"items": "pick.jsonl", "scorer": "choice"}}, holdout=0.4)
    measured = pd.concat([ready.measure(engine.lm, split).items for split in ("search", "holdout")])
    table = ready.items().merge(measured, on=ITEM_KEYS).set_index("prompt")
    after = [f"{end}{choice}" for choice in choices]
    _, likeliest = plain_loop(engine.model, engine.lm.tokenizer, asked, after, max_new_tokens=1)
    expected = [choices[i] for i in likeliest]
    assert [table.loc[prompt + end, "response"] for prompt in asked] == expected


def test_whole_texts_are_compared_by_all_of_their_tokens(tmp_path: Path, engine: Any) -> None:
    texts = [(f"The {i} cats sleep.", f"The {i} {'very ' * (i % 3)}cat sleeps well.") for i in range(14)]
    pairs = [own if i % 3 else own[::-1] for i, own in enumerate(texts)]
    write_lines(tmp_path / "pairs.jsonl", [{"good": good, "bad": bad} for good, bad in pairs])
    task = {"items": "pairs.jsonl", "fields": {"chosen": "good", "rejected": "bad"}, "scorer": "choice"}
    ready = make(tmp_path, {"pairs": task}, holdout=0.4)
    measured = pd.concat([ready.measure(engine.lm, split).items for split in ("search", "holdout")])
    table = ready.items().merge(measured, on=ITEM_KEYS).set_index("target")

    def log_likelihood(text: str) -> float:
        tokens = [
            engine.lm.prefix_token_id,
            *engine.lm.tokenizer(text, add_special_tokens=False).input_ids,
        ]
        with torch.no_grad():
            logprobs = engine.model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        return float(logprobs.gather(1, torch.tensor(tokens[1:])[:, None]).sum())

    expected = [float(log_likelihood(good) > log_likelihood(bad)) for good, bad in pairs]
    assert 0 < sum(expected) < len(pairs)
    assert [table.loc[good, "score"] for good, _ in pairs] == expected
    with pytest.raises(MergetuneError, match="whole texts: compare them with `chat_template: false`"):
        make(tmp_path, {"pairs": task}, chat_template=True)


ROWS = [{"q": f"Row {i}:", "a": f" colour {'red' if i % 3 else 'blue'}", "gold": i % 2} for i in range(24)]
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": ["red", "blue"]}
TASKS: dict[str, dict[str, Any]] = {
    "perplexity": {"output_type": "loglikelihood", "doc_to_text": "q", "doc_to_target": "a"},
    "word_perplexity": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "a"},
    "byte_perplexity": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "a"},
    "bits_per_byte": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "a"},
    "f1": {**CHOICE, "doc_to_target": "gold"},
    "mcc": {**CHOICE, "doc_to_target": "gold"},
    "brier_score": {**CHOICE, "doc_to_target": "gold"},
}


@pytest.mark.parametrize("metric", TASKS)
def test_a_metric_is_aggregated_as_its_task_does(metric: str, tmp_path: Path, engine: Engine) -> None:
    write_task(tmp_path, f"own_{metric}", ROWS, metric_list=[{"metric": metric}], **TASKS[metric])
    ready = make(tmp_path, {"o": {"lm_eval": f"own_{metric}"}})
    bound = next(iter(ready.tasks.values()))
    task_dict = {"tasks": {bound.task.task_name: bound.task}, "groups": {}}
    theirs = evaluate(lm=engine.lm, task_dict=task_dict, bootstrap_iters=0)["results"][f"own_{metric}"]
    found = ready.measure(engine.lm, "search")
    score = found.scores()["o"]
    assert score.value == pytest.approx(theirs[f"{metric},none"], rel=1e-9)
    assert score.n_items == len(ROWS)
    # the standard error of the linear scores is that of resampled items
    if found.items["parts"].notna().all():
        parts = np.array(found.items["parts"].tolist())[:, None, :]
        drawn = bootstrap_parts(parts, bound.aggregation.combine, n_resamples=4000)
        assert score.stderr == pytest.approx(drawn.std(), rel=0.5)


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in ("mean", "nanmean")])
def test_the_slope_of_an_aggregation_is_that_of_small_steps(name: str) -> None:
    aggregation, rng = KNOWN[name], np.random.default_rng(0)
    parts = rng.uniform(0.2, 1.0, size=(40, 4))
    mean, step = parts.mean(axis=0), 1e-6
    slope = [
        (aggregation.combine(mean + step * one) - aggregation.combine(mean - step * one)) / (2 * step)
        for one in np.eye(4)
    ]
    expected = aggregation.combine(mean) + (parts - mean) @ np.array(slope)
    assert np.allclose(aggregation.linear(parts), expected, rtol=1e-5, atol=1e-7)


CODE = """
import math
def results(doc, replies):
    number = int(doc["q"].split()[-1].rstrip(":"))
    wer = {"wer": number / 100, "hit": float(number % 2)}
    own = {"unclear": math.nan if number % 4 == 0 else 1.0, "percent": 1.0, "odd": number}
    return {**wer, **own, **({"scarce": number} if number % 3 == 0 else {})}
def percent(values): return 100 * sum(values) / len(values)
def skipping(values):
    kept = [value for value in values if value == value]
    return sum(kept) / len(kept)
def worst(values): return min(values)
"""


def write_own_task(folder: Path, code: str = CODE) -> None:
    (folder / "own.py").write_text(code)
    metrics = [
        {"metric": "wer", "aggregation": "mean", "higher_is_better": False},
        {"metric": "hit", "aggregation": "mean", "higher_is_better": True},
        {"metric": "unclear", "aggregation": "!function own.skipping", "higher_is_better": True},
        {"metric": "percent", "aggregation": "!function own.percent", "higher_is_better": True},
        {"metric": "odd", "aggregation": "!function own.worst", "higher_is_better": True},
        {"metric": "text", "aggregation": "bleu", "higher_is_better": True},
        {"metric": "scarce", "aggregation": "mean", "higher_is_better": True},
    ]
    config = {
        "output_type": "generate_until",
        "doc_to_text": "q",
        "doc_to_target": "a",
        "metric_list": metrics,
    }
    write_task(folder, "own", ROWS, process_results="!function own.results", **config)


class NumberLM(EvenLM):
    """Takes the prompts of the own task."""

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        return ["word"] * len(requests)


def test_items_without_a_value_are_left_out_and_counted(tmp_path: Path) -> None:
    write_own_task(tmp_path)
    ready = make(tmp_path, {"o": {"lm_eval": "own", "metric": "unclear"}})
    found = ready.measure(NumberLM(), "search")
    assert found.items["score"].isna().sum() == 6
    assert (found.scores()["o"].value, found.scores()["o"].n_items) == (1.0, 18)


def test_an_item_that_the_task_gives_no_value_for_is_left_out_as_by_lm_eval(tmp_path: Path) -> None:
    write_own_task(tmp_path)
    ready = make(tmp_path, {"o": {"lm_eval": "own", "metric": "scarce"}})
    bound, lm = next(iter(ready.tasks.values())), NumberLM()
    task_dict = {"tasks": {bound.task.task_name: bound.task}, "groups": {}}
    theirs = evaluate(lm=lm, task_dict=task_dict, bootstrap_iters=0)["results"]["own"]
    found = ready.measure(lm, "search")
    score, kept = found.scores()["o"], np.arange(0, len(ROWS), 3)
    assert score.value == pytest.approx(theirs["scarce,none"]) == pytest.approx(kept.mean())
    assert score.n_items == len(kept)
    whole = found.items.assign(score=1.0, aggregation="mean", parts=None)  # of another model, on all items
    joined = join_items({"base": whole, "some": found.items})["o"]
    assert joined.scores.mean(axis=0) == pytest.approx([1.0, kept.mean()])
    assert not joined.is_mean


def test_an_aggregation_of_the_tasks_own_may_be_a_multiple_of_the_mean(tmp_path: Path) -> None:
    write_own_task(tmp_path)
    score = make(tmp_path, {"o": {"lm_eval": "own", "metric": "percent"}}).measure(NumberLM(), "search")
    assert score.scores()["o"].value == 100.0


@pytest.mark.parametrize("metric", ["odd", "text"])
def test_a_metric_that_cannot_be_judged_by_items_is_refused_before_any_work(
    metric: str, tmp_path: Path
) -> None:
    write_own_task(tmp_path)
    with pytest.raises(MergetuneError, match=rf"`{metric}` of `own` is aggregated by .* Choose another"):
        make(tmp_path, {"o": {"lm_eval": "own", "metric": metric}})


def test_a_metric_without_a_number_is_refused_before_any_work(tmp_path: Path) -> None:
    task = {**CHOICE, "doc_to_target": "gold", "metric_list": [{"metric": "likelihood"}, {"metric": "acc"}]}
    write_task(tmp_path, "likely", ROWS, **task)
    with pytest.raises(MergetuneError, match="`likelihood` of `likely` must have a number per item"):
        make(tmp_path, {"o": {"lm_eval": "likely"}})


def test_the_direction_is_the_tasks_own(tmp_path: Path) -> None:
    write_own_task(tmp_path)
    config = make(tmp_path, {"o": {"lm_eval": "own"}, "p": {"lm_eval": "own", "metric": "hit"}}).suite.config
    assert [each.direction for each in config.objectives.values()] == ["minimize", "maximize"]
    assert [each.sign for each in config.objectives.values()] == [-1, 1]


@pytest.mark.parametrize(("metric", "direction"), [("wer", "maximize"), ("hit", "minimize")])
def test_a_direction_that_contradicts_the_task_must_be_meant(
    metric: str, direction: str, tmp_path: Path
) -> None:
    write_own_task(tmp_path)
    score = {"tasks": [{"lm_eval": "own", "metric": metric}], "direction": direction}
    with pytest.raises(
        MergetuneError, match=rf"`o.direction`: must be what the task says, but is `{direction}`"
    ):
        make(tmp_path, {"o": score})
    meant = make(tmp_path, {"o": {**score, "against_task": True}})
    assert meant.suite.config.objectives["o"].direction == direction


def test_tasks_of_one_score_must_agree_on_what_is_better(tmp_path: Path) -> None:
    write_own_task(tmp_path)
    both = [{"lm_eval": "own", "metric": metric} for metric in ("wer", "hit")]
    with pytest.raises(MergetuneError, match="must agree on what is better"):
        make(tmp_path, {"o": {"tasks": both}})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"metric": "wer,none"},
            r"no metric `wer,none`\. lm-eval writes .* say `metric: wer` and `filter: none`",
        ),
        ({"metric": "wers"}, r"no metric `wers`\. Did you mean `wer`"),
        ({"metric": "wer", "filter": "strict-match"}, r"no filter `strict-match`\. Valid: none"),
    ],
)
def test_a_metric_or_filter_named_wrongly_is_found_before_any_work(
    task: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_own_task(tmp_path)
    with pytest.raises(MergetuneError, match=message):
        make(tmp_path, {"o": {"lm_eval": "own", **task}})


def test_one_task_may_be_scored_by_several_metrics(tmp_path: Path) -> None:
    write_own_task(tmp_path)
    ready = make(
        tmp_path, {"o": {"lm_eval": "own", "metric": "wer"}, "p": {"lm_eval": "own", "metric": "hit"}}
    )
    scores = ready.measure(NumberLM(), "search").scores()
    assert scores["o"].value == pytest.approx(np.mean([i / 100 for i in range(24)]))
    assert scores["p"].value == 0.5


@pytest.mark.parametrize(
    "task",
    [
        {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "a"},
        {"output_type": "loglikelihood", "doc_to_text": "The text:", "doc_to_target": "a"},
        {
            "output_type": "multiple_choice",
            "doc_to_text": "",
            "doc_to_choice": "{{[a, q]}}",
            "doc_to_target": 0,
        },
    ],
)
def test_items_with_an_empty_prompt_are_split_by_what_makes_them_different(
    task: dict[str, Any], tmp_path: Path, engine: Engine
) -> None:
    rows = [{"q": "It is raining.", "a": f"The {i}th sentence."} for i in range(200)]
    write_task(tmp_path, "bare", rows, **task)
    ready = make(tmp_path, {"o": {"lm_eval": "bare"}}, holdout=0.5)
    assert len(ready.measure_documents(engine.lm, {"bare": [3, 1, 2]}).items) == 3
    assert 70 < ready.count("search") < 130
    assert ready.count("search") + ready.count("holdout") == 200


def test_rules_change_with_what_scores_and_with_nothing_else(tmp_path: Path) -> None:
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()
    for folder in (first, second):
        write_own_task(folder)
    task = {"o": {"lm_eval": "own", "metric": "wer"}}
    rules = make(first, task).rules
    assert make(second, task).rules == rules, "another folder, or another address of a function"
    write_own_task(second, CODE.replace("number / 100", "number / 50"))
    assert make(second, task).rules != rules
    assert make(first, {"o": {"lm_eval": "own", "metric": "hit"}}).rules != rules
    assert make(first, task, truncate="left").rules != rules


def test_only_replies_are_taken_for_replies_to_score_anew(tmp_path: Path) -> None:
    choices = {"choices": ["0", "1"], "answer": 0}
    write_lines(tmp_path / "pick.jsonl", [{"prompt": f"say {i}", **choices} for i in range(4)])
    write_lines(tmp_path / "say.jsonl", [{"prompt": f"say {i}", "answer": str(i)} for i in range(4)])
    files = {"choice": "pick.jsonl"}
    scorers = ("choice", "exact", "contains", "reply_tokens", "latency")
    tasks = [{"items": files.get(kind, "say.jsonl"), "scorer": kind} for kind in scorers]
    bound = [next(iter(make(tmp_path, {"o": task}).tasks.values())) for task in tasks]
    alike = {
        kind for kind, own in zip(scorers, bound, strict=True) if are_asked_alike(own.rules, bound[1].rules)
    }
    assert alike == {"exact", "contains", "reply_tokens"}


def test_linear_scores_keep_the_mean_and_the_rows(tmp_path: Path, engine: Engine) -> None:
    write_task(tmp_path, "own_ppl", ROWS, metric_list=[{"metric": "perplexity"}], **TASKS["perplexity"])
    write_lines(tmp_path / "say.jsonl", [{"prompt": f"say {i}", "answer": str(i)} for i in range(4)])
    say = {"items": "say.jsonl", "scorer": "exact", "max_new_tokens": 2}
    found = make(tmp_path, {"o": {"lm_eval": "own_ppl"}, "say": say}).measure(engine.lm, "search")
    linear = linear_scores(found.items)
    assert linear["item"].equals(found.items["item"])
    is_mean = found.items["score_name"] == "say"
    assert linear.loc[is_mean, "score"].equals(found.items.loc[is_mean, "score"])
    again = Measurement(linear.drop(columns="parts"), 0.0).scores()["o"]
    assert again.value == pytest.approx(found.scores()["o"].value)
