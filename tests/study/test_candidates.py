"""Candidates on tiny real models: what breaks, what that costs, and what a run goes on with."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from rich.console import Console

from mergetune.engines.engine import EngineConfig, LoadTime
from mergetune.errors import EngineError, MergetuneError
from mergetune.evaluation.evaluate import Evaluator, Score
from mergetune.evaluation.judging.agreement import Agreement
from mergetune.evaluation.suite import read_suite
from mergetune.measuring.progress import Progress
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.results.run_dir import Candidate, RunDir
from mergetune.space.recipe import MergeRecipe
from mergetune.study.candidates import Candidates, Proposal, write_facts
from mergetune.study.search import outcome
from plain_server import plain_server
from studies import write_study


@pytest.fixture(scope="module")
def half(tiny_half: dict[str, Path]) -> Inputs:
    return open_inputs(tiny_half["base"], {"a": tiny_half["a"]})


@contextmanager
def opened(
    inputs: Inputs, folder: Path, printed: io.StringIO, words: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Candidates]:
    """Lend candidates in the run directory `folder`/run; `words` changes the task of that name."""
    write_study(folder, inputs.base.folder, {})
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    suite["objectives"]["words"]["tasks"][0].update(words)
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    evaluator, run = Evaluator(read_suite(folder / "suite.yaml")), RunDir(folder / "run")
    (run.path / "candidates").mkdir(parents=True, exist_ok=True)
    write_facts(run, inputs, evaluator)
    progress = Progress(Console(file=printed, width=200))
    with closing(
        Candidates(EngineConfig(kind="transformers"), inputs, evaluator, run, progress)
    ) as candidates:
        yield candidates


def at(inputs: Inputs, value: float) -> MergeRecipe:
    lambdas = {"lambda": {"a": value}}
    return MergeRecipe.of_one_group("task_arithmetic", inputs.base_source, inputs.expert_sources, lambdas)


def judged(folder: Path, url: str, **options: Any) -> dict[str, Any]:
    """Return a change of the task `words` that has a judge score it."""
    (folder / "rubric.md").write_text("Score how friendly the reply is.")
    (folder / "say.jsonl").write_text("\n".join(json.dumps({"prompt": f"Say {i}."}) for i in range(40)))
    scorer = {"kind": "judge", "model": "plain", "url": url, "rubric": "rubric.md", **options}
    return {"items": "say.jsonl", "scorer": scorer}


def says(score: int) -> tuple[int, dict[str, Any]]:
    return 200, {"choices": [{"message": {"content": json.dumps({"reason": "So.", "score": score})}}]}


@pytest.mark.filterwarnings("ignore:The judge `plain` agrees too little")
def test_how_far_judges_agree_with_people_is_kept_with_the_first_measurement(
    half: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGETUNE_CACHE", str(tmp_path / "cache"))
    labels = [{"prompt": f"Say {i}.", "reply": "x", "label": 1 + i % 5} for i in range(10)]
    (tmp_path / "human.jsonl").write_text("\n".join(map(json.dumps, labels)))
    with plain_server(lambda _: says(3)) as url:
        words = judged(tmp_path, url, labels="human.jsonl")
        with opened(half, tmp_path, io.StringIO(), words) as candidates:
            assert candidates.run.agreements() == {}
            candidates.measure(Proposal("trial", "trial-0001", at(half, 1.0)))
    known = {"words": {"words:say.jsonl": Agreement("plain", 10, 0.2, 0.0)}}
    assert candidates.run.agreements() == known


FAR = 1e9  # beyond what float16 holds


def test_what_fails_keeps_its_seconds(half: Inputs, tmp_path: Path) -> None:
    with opened(half, tmp_path, io.StringIO()) as candidates:
        failed = candidates.measure(Proposal("trial", "trial-0001", at(half, FAR)))
    assert failed.state == "failed"
    assert failed.cost.total_s == failed.cost.lost_s > 0
    assert candidates.run.candidates() == [failed]


def test_what_cannot_be_confirmed_is_said_and_no_error(half: Inputs, tmp_path: Path) -> None:
    printed = io.StringIO()
    with opened(half, tmp_path, printed) as candidates:
        candidates.confirm(Candidate(name="far", number=0, role="trial", recipe=at(half, FAR)))
        candidates.confirm(Candidate(name="near", number=1, role="trial", recipe=at(half, 1.0)))
    assert "holdout: far              failed: " in printed.getvalue()
    assert candidates.run.all_scores("holdout").keys() == {"near"}


def test_a_second_attempt_counts_what_the_first_took(
    half: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(recipe: MergeRecipe) -> None:
        raise EngineError("gone")

    with opened(half, tmp_path, io.StringIO()) as candidates:
        monkeypatch.setattr(candidates.pool.engine, "load", break_down)
        found = candidates.measure(Proposal("trial", "trial-0001", at(half, 1.0)))
    cost = found.cost
    assert (found.state, found.faults) == ("complete", ("gone",))
    assert cost.total_s > cost.lost_s > 0


def test_a_load_that_comes_while_prompts_are_made_is_no_part_of_evaluating(
    half: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(half, tmp_path, io.StringIO()) as candidates:
        engine = candidates.pool.engine
        assert engine is not None
        load = engine.load

        def slow(recipe: MergeRecipe) -> LoadTime:
            time.sleep(1.5)
            took = load(recipe)
            return LoadTime(took.merge_s, took.load_s + 1.5)

        monkeypatch.setattr(engine, "load", slow)
        began = time.monotonic()
        cost = candidates.measure(Proposal("trial", "trial-0001", at(half, 1.0))).cost
        elapsed = time.monotonic() - began
    assert cost.load_s >= 1.5
    assert 0 < cost.evaluate_s < elapsed - 1.5
    assert cost.total_s == pytest.approx(elapsed, abs=0.5)


def test_other_versions_than_before_are_said(half: Inputs, tmp_path: Path) -> None:
    printed = io.StringIO()
    with opened(half, tmp_path, printed) as candidates:
        candidates.run.write_versions("transformers", {**candidates.run.versions(), "torch": "0.1"})
    assert "warning" not in printed.getvalue()
    with opened(half, tmp_path, printed):
        pass
    assert "was measured with torch 0.1 (now " in printed.getvalue()


def test_what_a_tasks_own_code_raises_fails_the_trial_alone(
    half: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_in(scorer: object, items: object, replies: object) -> None:
        raise ZeroDivisionError("of the task's own code")

    with opened(half, tmp_path, io.StringIO()) as candidates:
        scorer = next(iter(candidates.evaluator.tasks.values())).config.scorer
        with monkeypatch.context() as patched:
            patched.setattr(type(scorer), "score", raise_in)
            failed = candidates.measure(Proposal("trial", "trial-0001", at(half, 0.5)))
            with pytest.raises(MergetuneError, match="baseline `base` cannot be measured: ZeroDivisionError"):
                candidates.measure(Proposal("base", "base", at(half, 0.0)))
        found = candidates.measure(Proposal("trial", "trial-0002", at(half, 1.0)))
    assert (failed.state, failed.reason) == ("failed", "ZeroDivisionError: of the task's own code")
    assert found.state == "complete"


def test_a_candidate_that_ends_the_process_is_tried_twice(half: Inputs, tmp_path: Path) -> None:
    with opened(half, tmp_path, io.StringIO()) as candidates:
        for _ in range(2):  # killed in the middle: the attempt was begun and never ended
            candidates.run.begin_attempt("search.trial-0001", at(half, 0.5).digest)
        candidates.run.begin_attempt("search.trial-0002", at(half, 1.0).digest)
        poison = candidates.measure(Proposal("trial", "trial-0001", at(half, 0.5)))
        other = candidates.measure(Proposal("trial", "trial-0002", at(half, 1.0)))
    assert poison.state == "failed"
    assert "begun 2 times: twice the process ended in the middle of it" in str(poison.reason)
    assert other.state == "complete"


def test_optuna_hears_that_a_guard_met_exactly_is_kept_and_by_how_many_margins_another_is_broken(
    half: Inputs, tmp_path: Path
) -> None:
    with opened(half, tmp_path, io.StringIO()) as candidates:
        file = tmp_path / "suite.yaml"
        file.write_text(file.read_text().replace("margin: 0.5", "margin: 0.1"))
        candidates.evaluator = Evaluator(read_suite(file))
        rest = {"words": Score(0.5, 0.1, 20), "parity": Score(0.5, 0.1, 20)}
        for n_items in (20, 100):
            for right in range(n_items // 2, n_items + 1):
                candidates.scores["base"] = rest | {"calm": Score(right / n_items, 0.05, n_items)}
                for lost, met in ((n_items // 10, True), (n_items // 10 + 1, False)):
                    tried = rest | {"calm": Score((right - lost) / n_items, 0.05, n_items)}
                    told = outcome(tried, candidates.scores, candidates.evaluator.suite.config)
                    constraints = told.constraints
                    assert told.values == (0.5, 0.5)
                    assert constraints["calm"] == pytest.approx(0 if met else 1 / n_items / 0.1)
                    assert (constraints["calm"] <= 0) == met


def test_what_is_no_fault_of_a_candidate_does_not_fail_it(half: Inputs, tmp_path: Path) -> None:
    """Replies cannot be written, as on a full disk: the study ends, however often, and then goes on."""
    with opened(half, tmp_path, io.StringIO()) as candidates:
        replies = candidates.run.path / "replies"
        replies.write_text("in the way")
        for _ in range(3):
            with pytest.raises(OSError, match="replies"):
                candidates.measure(Proposal("trial", "trial-0001", at(half, 1.0)))
        replies.unlink()
        assert candidates.measure(Proposal("trial", "trial-0001", at(half, 1.0))).state == "complete"
