"""Evaluation on a real engine: per item, paired, holdout unseen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from lm_eval.api.model import LM

from mergetune.engines.engine import Engine, EngineConfig
from mergetune.engines.start import start_engine
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import Evaluator, Measurement
from mergetune.evaluation.suite import read_suite


class RecordingLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """A model for lm-eval that writes down each prompt it is shown and answers `said`."""

    def __init__(self, said: str = "yes", log_likelihood: float = -1.0) -> None:
        super().__init__()
        self.prompts: list[str] = []
        self.said, self.log_likelihood = said, log_likelihood

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.said] * len(requests)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.prompts += [request.args[0] for request in requests]
        return [(self.log_likelihood, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    generation = [
        {"prompt": f"Say the word number {i}.", "answer": "yes" if i % 4 else "no"} for i in range(40)
    ]
    choice = [{"prompt": f"Is {i} even?", "choices": ["Yes", "No"], "answer": i % 2} for i in range(30)]
    odd = [{"prompt": f"Is {i} odd?", "choices": ["Yes", "No"], "answer": 1 - i % 2} for i in range(30)]
    shots = [{"prompt": f"Example {i}", "answer": f"shown {i}"} for i in range(5)]
    for name, items in (("generation", generation), ("choice", choice), ("odd", odd), ("shots", shots)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    (folder / "own_task.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "own_task",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(folder / "odd.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "prompt",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
                "num_fewshot": 3,
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )
    )
    return folder


def evaluator(folder: Path, holdout: float = 0.5, **tasks: dict[str, Any]) -> Evaluator:
    suite = {
        "description": "test",
        "chat_template": False,
        "holdout": holdout,
        "include_path": ".",
        "objectives": {name: {"tasks": [task]} for name, task in tasks.items()},
    }
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    return Evaluator(read_suite(path))


GENERATION = {"items": "generation.jsonl", "scorer": "exact", "max_new_tokens": 4}
CHOICE = {"items": "choice.jsonl", "scorer": "choice"}


def test_the_search_never_sees_a_holdout_item(folder: Path) -> None:
    ready = evaluator(
        folder,
        words={**GENERATION, "num_fewshot": 2, "fewshot_items": "shots.jsonl"},
        parity=CHOICE,
        own={"lm_eval": "own_task"},
    )
    items = ready.items()
    assert set(items["split"]) == {"search", "holdout"}
    search, holdout = RecordingLM(), RecordingLM()
    searched, held = ready.measure(search, "search"), ready.measure(holdout, "holdout")
    assert not set(searched.items["item"]) & set(held.items["item"])
    seen = "\n".join(search.prompts)
    for prompt in items.loc[items["split"] == "holdout", "prompt"]:
        assert prompt not in seen, f"the search saw the holdout item {prompt!r}"
    assert len(searched.items) + len(held.items) == len(items)


def test_targets_say_what_an_item_asks_for(folder: Path) -> None:
    cheers = [{"prompt": f"Cheer {i}.", "patterns": [f"{i}!"]} for i in range(4)]
    (folder / "cheers.jsonl").write_text("\n".join(map(json.dumps, cheers)))
    regex = {"items": "cheers.jsonl", "scorer": {"kind": "regex", "patterns": ["[A-Z]"]}}
    items = evaluator(folder, holdout=0.0, words=GENERATION, parity=CHOICE, cheers=regex).items()
    targets = {str(name): own["target"].tolist() for name, own in items.groupby("score_name")}
    assert set(targets["words"]) == {"yes", "no"}
    assert set(targets["parity"]) == {"Yes", "No"}
    assert targets["cheers"] == [f"the share met of these patterns:\n[A-Z]\n{i}!" for i in range(4)]


def test_scores_are_kept_per_item_and_averaged(folder: Path) -> None:
    measurement = evaluator(folder, holdout=0.0, words=GENERATION).measure(RecordingLM("yes"), "search")
    assert len(measurement.items) == 40
    score = measurement.scores()["words"]
    assert score.value == 0.75
    assert score.stderr == pytest.approx(np.std([0] * 10 + [1] * 30, ddof=1) / np.sqrt(40))
    assert set(measurement.items["response"]) == {"yes"}


def test_several_tasks_weigh_the_same_whatever_their_size(folder: Path) -> None:
    ready = evaluator(folder, holdout=0.0, words=GENERATION)
    both = evaluator(folder, holdout=0.0, words=GENERATION, parity=CHOICE)
    assert (
        both.measure(RecordingLM("yes"), "search").scores()["words"]
        == ready.measure(RecordingLM("yes"), "search").scores()["words"]
    )


def test_few_shot_prompts_do_not_depend_on_which_items_run(folder: Path) -> None:
    shots = {**GENERATION, "num_fewshot": 2, "fewshot_items": "shots.jsonl"}
    everything, part = RecordingLM(), RecordingLM()
    evaluator(folder, holdout=0.0, words=shots, own={"lm_eval": "own_task"}).measure(everything, "search")
    evaluator(folder, holdout=0.7, words=shots, own={"lm_eval": "own_task"}).measure(part, "search")
    assert 0 < len(part.prompts) < len(everything.prompts)
    assert set(part.prompts) <= set(everything.prompts)
    assert any("Example 1" in prompt for prompt in part.prompts)


def test_items_that_serve_as_examples_are_in_no_split(folder: Path) -> None:
    ready = evaluator(folder, own={"lm_eval": "own_task"})
    assert ready.count("search") + ready.count("holdout") == 30 - 3
    assert not {"Is 0 odd?", "Is 1 odd?", "Is 2 odd?"} & set(ready.items()["prompt"])


def test_metric_and_limit_of_an_lm_eval_task(folder: Path) -> None:
    task = {"lm_eval": "own_task", "metric": "acc_norm", "limit": 20, "num_fewshot": 0}
    assert evaluator(folder, holdout=0.0, own=task).count("search") == 20
    with pytest.raises(MergetuneError, match="no metric `accuracy`"):
        evaluator(folder, holdout=0.0, own={**task, "metric": "accuracy"}).measure(RecordingLM(), "search")


def test_an_unknown_lm_eval_task_names_the_nearest(folder: Path) -> None:
    with pytest.raises(MergetuneError, match=r"no task `arc_esy`. Did you mean `arc_easy`"):
        evaluator(folder, own={"lm_eval": "arc_esy"})


@pytest.mark.parametrize(("holdout", "found"), [(0.0, "1 in the search"), (0.5, "[01] in the search")])
def test_a_split_needs_two_items_of_each_task(folder: Path, holdout: float, found: str) -> None:
    (folder / "one.jsonl").write_text('{"prompt": "only", "answer": "x"}\n')
    with pytest.raises(MergetuneError, match=rf"`words:one\.jsonl` has {found} split: 1 items were split"):
        evaluator(folder, holdout, words={"items": "one.jsonl", "scorer": "exact"})


def test_a_task_of_one_item_leaves_the_error_unknown() -> None:
    items = pd.DataFrame({"score_name": "s", "task": ["a", "a", "b"], "score": [0.0, 1.0, 1.0]})
    score = Measurement(items, 0.0).scores()["s"]
    assert (score.value, score.stderr) == (0.75, math.inf)


def test_a_score_that_is_no_number_fails_the_trial(folder: Path) -> None:
    ready = evaluator(folder, holdout=0.0, own={"lm_eval": "own_task"})
    measured = ready.measure(RecordingLM(log_likelihood=-2.0), "search")
    assert measured.items["score"].isin([0.0, 1.0]).all()
    with pytest.raises(TrialError, match="NaN"):
        ready.measure(RecordingLM(log_likelihood=float("nan")), "search")


def test_repeated_items_have_ids_of_their_own(folder: Path) -> None:
    (folder / "twice.jsonl").write_text('{"prompt": "same", "answer": "x"}\n' * 3)
    items = evaluator(folder, holdout=0.0, words={"items": "twice.jsonl", "scorer": "exact"}).items()
    assert items["item"].is_unique


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[Engine]:
    engine = start_engine(EngineConfig(kind="transformers", batch_size=8), tiny_base)
    yield engine
    engine.close()


def test_measuring_twice_gives_the_same_scores_and_replies(folder: Path, engine: Engine) -> None:
    ready = evaluator(folder, words=GENERATION, parity=CHOICE)
    first, second = (ready.measure(engine.lm, "search").items for _ in range(2))
    assert first.equals(second)
    assert set(first.loc[first["score_name"] == "parity", "response"]) <= {"Yes", "No"}
