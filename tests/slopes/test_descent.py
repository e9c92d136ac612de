"""Descent on real small models: losses fall, coefficients stay in their ranges, costs are counted."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.model import TemplateLM

from mergetune.engines.completions import Scoring
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import TrialError
from mergetune.evaluation.evaluate import Evaluator, Score
from mergetune.evaluation.suite import SuiteConfig, read_suite
from mergetune.merging.inputs import Inputs
from mergetune.slopes.descent import Laws, MeasuredModel, Problem, Trajectory, learn_laws, take_steps
from mergetune.slopes.gradients import slopes
from mergetune.slopes.losses import mean_losses
from mergetune.slopes.references import Reference, References, find_references
from mergetune.space.recipe import MergeRecipe
from mergetune.space.search_space import SearchSpace
from mergetune.space.search_space_config import SearchSpaceConfig

TASKS = {"tasks": [{"items": "items.jsonl", "scorer": "exact"}]}
SUITE = SuiteConfig.model_validate(
    {
        "description": "test",
        "chat_template": False,
        "objectives": {"first": TASKS, "second": TASKS},
        "guards": {"guard": {**TASKS, "margin": 0.1}},
    }
)
GROUPS = [{"name": "layers", "match": r"layers\."}, {"name": "rest", "match": r"^(?!.*layers\.)"}]
START = {"lambda.layers.a": 0.5, "lambda.layers.b": 0.5, "lambda.rest.a": 0.5, "lambda.rest.b": 0.5}


def space_of(inputs: Inputs, method: str = "task_arithmetic", **ranges: Any) -> SearchSpace:
    config = {"description": "test", "method": method, **({"groups": GROUPS} | ranges)}
    return SearchSpace(
        SearchSpaceConfig.model_validate(config),
        inputs.base_source,
        inputs.expert_sources,
        inputs.changed,
        inputs.base.names,
    )


def references(n_items: int = 8) -> References:
    """Random texts; those of one score are much alike, so that all of them gain by the same change."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for name in (*SUITE.objectives, *SUITE.guards):
        reply = torch.randint(3, 300, (6,), generator=generator).tolist()
        for number in range(n_items):
            prompt = torch.randint(3, 300, (4,), generator=generator).tolist()
            items.append(Reference(name, "task", f"{name}{number}", (Scoring([*prompt, *reply], 4),)))
    return References(tuple(items))


@dataclass(frozen=True)
class Case:
    """A problem, and models whose scores are known."""

    problem: Problem
    known: dict[str, MeasuredModel]


def case_of(inputs: Inputs, space: SearchSpace, n_texts: int = 200) -> Case:
    """The base fails at both objectives and the experts are good at one each, so the scores say."""
    lambdas = {"base": (0.0, 0.0), "expert-a": (1.0, 0.0), "expert-b": (0.0, 1.0)}
    known = {}
    for name, (a, b) in lambdas.items():
        recipe = MergeRecipe.of_one_group(
            "task_arithmetic", inputs.base_source, inputs.expert_sources, {"lambda": {"a": a, "b": b}}
        )
        scores = {"first": Score(a, 0.1, 9), "second": Score(b, 0.1, 9), "guard": Score(1.0, 0.0, 9)}
        known[name] = MeasuredModel(recipe, scores)
    return Case(Problem(inputs.merger, space, references(), SUITE, n_texts), known)


def descend(
    engine: TransformersEngine, case: Case, start: dict[str, float] = START, n_steps: int = 8
) -> dict[str, float]:
    """Where steps with the suite's own weights lead."""
    laws = learn_laws(engine, case.problem, case.known)
    objectives = case.problem.suite.objectives
    trajectory = Trajectory(
        weights={name: objectives[name].weight for name in case.problem.objectives}, params=start
    )
    return take_steps(engine, case.problem, laws, trajectory, n_steps).params


def losses_at(engine: TransformersEngine, problem: Problem, params: dict[str, float]) -> dict[str, float]:
    engine.load(problem.space.recipe(params))
    return mean_losses(engine.model, problem.references)


def test_losses_fall_within_the_ranges_and_costs_are_counted(
    inputs: Inputs, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts that go through the model are counted; with a backward pass one counts three times."""
    case = case_of(inputs, space_of(inputs))
    before = losses_at(engine, case.problem, START)
    counted: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        counted.append(len(kwargs["input_ids"]) * (3 if torch.is_grad_enabled() else 1))
        return plain(*args, **kwargs)

    plain = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", functools.wraps(plain)(forward))
    laws = learn_laws(engine, case.problem, case.known)
    assert laws.n_passes == sum(counted) == 3 * 2 * 8 + 8  # three models; the base on the guard's items, too
    counted.clear()
    steps: list[int] = []
    trajectory = Trajectory(weights={"first": 1.0, "second": 1.0}, params=START)
    found = take_steps(engine, case.problem, laws, trajectory, 8, steps.append)
    assert found.n_passes == sum(counted) == 8 * 3 * 4 * 3  # four items of each score
    assert steps == [*range(1, 9)]
    assert found.params.keys() == START.keys()
    assert all(0 <= value <= 2 for value in found.params.values())
    after = losses_at(engine, case.problem, found.params)
    assert after["first"] + after["second"] < before["first"] + before["second"]


def test_steps_are_those_of_adam_by_hand(inputs: Inputs, engine: TransformersEngine) -> None:
    """Kingma and Ba 2015, algorithm 1, on the slopes at each point; the checkpoint is the mean of five."""
    case = case_of(inputs, space_of(inputs))
    problem, n_steps = replace(case.problem, suite=SUITE.model_copy(update={"guards": {}})), 7
    laws = learn_laws(engine, problem, case.known)
    begin = Trajectory(weights={"first": 1.0, "second": 3.0}, params=START)
    found = take_steps(engine, problem, laws, begin, n_steps)
    at, visited = np.array([START[key] for key in problem.keys]), []
    mean, square = np.zeros(len(at)), np.zeros(len(at))
    for step in range(1, n_steps + 1):
        recipe = problem.space.recipe(dict(zip(problem.keys, at.tolist(), strict=True)))
        items = problem.batches[(step - 1) % 2]
        own = slopes(engine, problem.merger, recipe, items)
        table = own.by_group(recipe.groups).pivot_table("slope", ["group", "expert"], "score_name")
        odds = {
            name: weight * (own.losses[name] / laws.links[name].half) ** laws.links[name].steepness
            for name, weight in begin.weights.items()
        }
        slope = np.zeros(len(at))
        for name in odds:
            log_slope = odds[name] * laws.links[name].log_odds_slope(own.losses[name])
            slope += log_slope * np.array([table.loc[tuple(k.split(".")[1:]), name] for k in problem.keys])
        slope /= sum(odds.values())
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        rate = 0.1 / math.sqrt(1 + (step - 1) / 20)
        unbiased = mean / (1 - 0.9**step), square / (1 - 0.999**step)
        at = np.clip(at - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8), 0.0, 2.0)
        visited.append(at)
    assert [found.params[key] for key in problem.keys] == pytest.approx(np.mean(visited[-5:], 0), abs=2e-4)


def test_a_descent_that_goes_on_is_the_same_as_one_at_a_stretch(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    case = case_of(inputs, space_of(inputs))
    laws = learn_laws(engine, case.problem, case.known)
    assert learn_laws(engine, case.problem, case.known) == laws
    begin = Trajectory(weights={"first": 1.0, "second": 1.0}, params=START)
    whole = take_steps(engine, case.problem, laws, begin, 9)
    half = take_steps(engine, case.problem, laws, begin, 4).trajectory
    kept = Trajectory.model_validate_json(half.model_dump_json())
    rest = take_steps(engine, case.problem, Laws.model_validate_json(laws.model_dump_json()), kept, 5)
    assert rest.trajectory == whole.trajectory
    assert rest.params == whole.params


def test_a_guard_turns_the_descent_and_so_does_a_weight(inputs: Inputs, engine: TransformersEngine) -> None:
    case = case_of(inputs, space_of(inputs))
    unguarded = replace(case, problem=replace(case.problem, suite=SUITE.model_copy(update={"guards": {}})))
    watched, unwatched = (
        losses_at(engine, case.problem, descend(engine, each, n_steps=16)) for each in (case, unguarded)
    )
    assert watched["guard"] < unwatched["guard"]
    ends = {}
    for name in ("first", "second"):
        suite = SUITE.model_dump(by_alias=True, exclude_none=True) | {"guards": {}}
        suite["objectives"][name]["weight"] = 50.0
        own = replace(case.problem, suite=SuiteConfig.model_validate(suite))
        ends[name] = losses_at(engine, case.problem, descend(engine, replace(case, problem=own), n_steps=16))
    assert ends["first"]["first"] < ends["second"]["first"]
    assert ends["second"]["second"] < ends["first"]["second"]


@pytest.mark.parametrize("lead", [0.0, 0.005], ids=["alike", "one item of 200"])
def test_an_objective_that_no_known_model_is_better_at_does_not_rule(
    inputs: Inputs, engine: TransformersEngine, lead: float
) -> None:
    case = case_of(inputs, space_of(inputs))
    values = {"base": 0.5, "expert-a": 0.5, "expert-b": 0.5 + lead}
    known = {
        name: replace(each, scores={**each.scores, "second": Score(values[name], 0.035, 200)})
        for name, each in case.known.items()
    }
    alone, together = (
        losses_at(engine, case.problem, descend(engine, each, n_steps=16))
        for each in (replace(case, known=known), case)
    )
    assert alone["first"] <= together["first"]
    assert alone["second"] > together["second"]


@pytest.mark.parametrize("where_it_learns", [True, False])
def test_a_loss_that_is_not_finite_is_said(
    inputs: Inputs, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, where_it_learns: bool
) -> None:
    case = case_of(inputs, space_of(inputs))
    monkeypatch.setattr(engine.model, "forward", overflowing(engine.model.forward, where_it_learns))
    with pytest.raises(TrialError, match=r"the loss of `first` must be finite, but got nan.*float32"):
        descend(engine, case)


def overflowing(forward: Callable[..., Any], where_it_learns: bool) -> Callable[..., Any]:
    """A model whose logits overflow, where it learns or everywhere else."""

    @functools.wraps(forward)
    def overflow(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if torch.is_grad_enabled() == where_it_learns:
            found.logits = found.logits * math.inf
        return found

    return overflow


@pytest.mark.parametrize(
    ("n_texts", "n_items", "n_steps"),
    [(24, 1, 5), (100, 2, 6), (180, 4, 5), (300, 4, 8), (10_000, 4, 20)],
)
def test_steps_cost_about_as_much_as_measuring_where_they_lead(
    inputs: Inputs, n_texts: int, n_items: int, n_steps: int
) -> None:
    problem = case_of(inputs, space_of(inputs), n_texts).problem
    assert {len(own) for own in problem.batches[0].by_score.values()} == {n_items}
    assert problem.n_steps == n_steps  # three scores, and each item's pass counts thrice


def test_densities_stay_and_coefficients_of_all_methods_descend_on_their_grid(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    step = {"low": 0.0, "high": 2.0, "step": 0.25}
    ties = space_of(inputs, "ties", **{"lambda": step, "density": {"low": 0.2, "high": 0.8}})
    begin = {key: 0.5 for key in ties.distributions}
    params = descend(engine, case_of(inputs, ties), begin)
    assert all(value == 0.5 for key, value in params.items() if key.startswith("density"))
    own = [value for key, value in params.items() if key.startswith("lambda")]
    assert own != [0.5] * len(own)
    assert all(value % 0.25 == 0 for value in own)
    anchors = space_of(inputs, "slerp", groups=[], anchors=2)
    begin = {key: 0.5 for key in anchors.distributions}
    params = descend(engine, case_of(inputs, anchors), begin)
    assert params.keys() == {"t.anchor0", "t.anchor1"}
    assert params != begin


def test_a_coefficient_that_cannot_change_is_not_descended_on(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    still = {"low": 0.5, "high": 0.5}
    space = space_of(inputs, groups=[GROUPS[0], {**GROUPS[1], "lambda": still}])
    assert {share.key for share in space.smooth_shares()} == {"lambda.layers.a", "lambda.layers.b"}
    params = descend(engine, case_of(inputs, space))
    assert params["lambda.rest.a"] == params["lambda.rest.b"] == 0.5
    assert params != START


# Directions

RIGHT = {"answer": "Yes", "choices": ["y", "n"]}
TASKS_OF: dict[str, dict[str, Any]] = {
    "choices": {"items": "choices.jsonl", "scorer": "choice"},
    "replies": {"items": "replies.jsonl", "scorer": "exact"},
    "texts": {"lm_eval": "texts"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items that all want the same: the same choice, the same reply, the same text."""
    folder = tmp_path_factory.mktemp("directions")
    rows = [{**RIGHT, "prompt": f"Is it so, number {i}?"} for i in range(12)]
    for name, changes in (("choices", {"answer": 0}), ("replies", {}), ("texts", {"text": "So it is."})):
        lines = [json.dumps({**row, **changes}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}} {{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    (folder / "texts.yaml").write_text(yaml.safe_dump(task))
    return folder


def directed(folder: Path, engine: TransformersEngine, case: Case, **suite: Any) -> Case:
    """The problem of a suite with the references of its items; every model known scores alike."""
    rules = {"description": "test", "chat_template": False, "holdout": 0.0, "include_path": "."}
    (folder / "suite.yaml").write_text(yaml.safe_dump(rules | suite))
    evaluator = Evaluator(read_suite(folder / "suite.yaml"))
    found = find_references(evaluator, cast(TemplateLM, engine.lm))
    alike = dict.fromkeys(evaluator.suite.config.scores, Score(0.5, 0.1, 9))
    known = {name: replace(each, scores=alike) for name, each in case.known.items()}
    return Case(replace(case.problem, suite=evaluator.suite.config, references=found), known)


@pytest.mark.parametrize("kind", TASKS_OF)
def test_objectives_that_differ_in_direction_alone_are_followed_opposite_ways(
    inputs: Inputs, engine: TransformersEngine, folder: Path, kind: str
) -> None:
    case = case_of(inputs, space_of(inputs))
    likelier, less_likely = ("minimize", "maximize") if kind == "texts" else ("maximize", "minimize")
    wanted: Problem | None = None
    moves, losses, before = [], [], 0.0
    for direction in (likelier, less_likely):
        objective = {"direction": direction, "against_task": True, "tasks": [TASKS_OF[kind]]}
        own = directed(folder, engine, case, objectives={"score": objective})
        wanted = wanted or own.problem
        before = before or losses_at(engine, wanted, START)["score"]
        params = descend(engine, own)
        moves.append(torch.tensor([params[key] - START[key] for key in START]))
        losses.append(losses_at(engine, wanted, params)["score"])
    assert losses[0] < before < losses[1]
    assert float(moves[0] @ moves[1]) < 0


@pytest.mark.parametrize("kind", TASKS_OF)
def test_guards_that_differ_in_direction_alone_turn_a_descent_opposite_ways(
    inputs: Inputs, engine: TransformersEngine, folder: Path, kind: str
) -> None:
    """Each is held against the expert that is better by it, so that both turn the descent."""
    case = case_of(inputs, space_of(inputs))
    likelier, less_likely = ("minimize", "maximize") if kind == "texts" else ("maximize", "minimize")
    objective = {"tasks": [{"items": "other.jsonl", "scorer": "exact"}]}
    others = [json.dumps({"prompt": f"What is {i}?", "answer": "a number"}) for i in range(12)]
    (folder / "other.jsonl").write_text("\n".join(others))
    wanted: Problem | None = None
    at_ends = []
    for direction in (likelier, less_likely):
        guard = {"direction": direction, "against_task": True, "tasks": [TASKS_OF[kind]], "margin": 0.1}
        own = directed(folder, engine, case, objectives={"other": objective}, guards={"guard": guard})
        wanted = wanted or own.problem
        held = replace(own.problem, suite=held_against_the_best(engine, own))
        params = descend(engine, replace(own, problem=held), n_steps=16)
        at_ends.append(losses_at(engine, wanted, params)["guard"])
    assert at_ends[0] < at_ends[1]


def held_against_the_best(engine: TransformersEngine, case: Case) -> SuiteConfig:
    """The suite with a guard whose reference is the expert with the least loss by it."""
    losses = {}
    for name in ("a", "b"):
        engine.load(case.known[f"expert-{name}"].recipe)
        losses[name] = mean_losses(engine.model, case.problem.references)["guard"]
    reference = min(losses, key=lambda name: losses[name])
    suite = case.problem.suite
    held = suite.guards["guard"].model_copy(update={"reference": reference})
    return suite.model_copy(update={"guards": {"guard": held}})


def test_the_slope_of_a_shared_or_interpolated_coefficient_is_that_of_what_it_is_made_of(
    inputs: Inputs,
) -> None:
    shared: dict[str, Any] = {"low": 0.0, "high": 1.0, "shared": True}
    for space in (
        space_of(inputs, groups=[], anchors=2),
        space_of(inputs, "task_arithmetic", **{"lambda": shared}),
        space_of(inputs),
    ):
        point = {key: 0.3 for key in space.distributions}
        for key in point:
            moved = space.recipe({**point, key: 0.8})
            found: dict[tuple[str, str], float] = {}
            for before, after in zip(space.recipe(point).groups, moved.groups, strict=True):
                for expert, value in after.per_expert("lambda").items():
                    found[after.name, expert] = (value - before.per_expert("lambda")[expert]) / 0.5
            shares = {(s.group, s.expert): s.weight for s in space.smooth_shares() if s.key == key}
            assert shares == pytest.approx({k: v for k, v in found.items() if abs(v) > 1e-9})
