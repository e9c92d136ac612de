"""Descent on real small models: losses fall, coefficients stay in their ranges, costs are counted."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from lm_eval.api.model import TemplateLM

from mergetune.engines.completions import Scoring
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import Evaluator, Score
from mergetune.evaluation.suite import SuiteConfig, read_suite
from mergetune.merging.inputs import Inputs
from mergetune.slopes.descent import DescentConfig, MeasuredModel, Problem, descend
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
CONFIG = DescentConfig(full_evaluations=20.0, fewest=2, most=2, held_out=2, first_steps=4, next_steps=2)
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


def problem_of(engine: TransformersEngine, inputs: Inputs, space: SearchSpace) -> Problem:
    """The base fails at both objectives and the experts are good at one each, so the scores say."""
    lambdas = {"base": (0.0, 0.0), "expert-a": (1.0, 0.0), "expert-b": (0.0, 1.0)}
    known = {}
    for name, (a, b) in lambdas.items():
        recipe = MergeRecipe.of_one_group(
            "task_arithmetic", inputs.base_source, inputs.expert_sources, {"lambda": {"a": a, "b": b}}
        )
        scores = {"first": Score(a, 0.1, 9), "second": Score(b, 0.1, 9), "guard": Score(1.0, 0.0, 9)}
        known[name] = MeasuredModel(recipe, scores)
    return Problem(engine, inputs.merger, space, references(), SUITE, known, scored=(), n_texts=30)


def losses_at(problem: Problem, params: dict[str, float], held_out: bool = True) -> dict[str, float]:
    problem.engine.load(problem.space.recipe(params))
    apart, rest = problem.references.parts(CONFIG.held_out)
    return mean_losses(problem.engine.model, apart if held_out else rest)


def test_losses_fall_on_items_held_out_and_costs_are_counted(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    problem = problem_of(engine, inputs, space_of(inputs))
    steps: list[tuple[int, int]] = []
    found = descend(problem, START, CONFIG, lambda step, of: steps.append((step, of)))
    before = losses_at(problem, START)
    for point in found.points:
        assert point.losses == pytest.approx(losses_at(problem, point.params))
        assert point.params.keys() == START.keys()
        assert all(0 <= value <= 2 for value in point.params.values())
    assert (
        min(p.losses["first"] + p.losses["second"] for p in found.points) < before["first"] + before["second"]
    )
    n_steps = CONFIG.first_steps + 2 * CONFIG.next_steps
    assert steps == [(step, n_steps) for step in range(1, n_steps + 1)]
    learned = 3 * 3 * 2  # three known models on two items of each of three scores
    guarded = 3 * 2  # the base on the guard's items of each batch
    measured = 4 * 3 * 2  # the start, and the ends of three weightings
    assert found.n_passes == learned + guarded + 3 * 3 * 2 * n_steps + measured


def test_a_guard_turns_the_descent_and_so_does_a_weight(inputs: Inputs, engine: TransformersEngine) -> None:
    kept = dict.fromkeys(SUITE.scores, Score(1.0, 0.0, 1000))
    problem = replace(problem_of(engine, inputs, space_of(inputs)), scored=[(START, kept)])
    config = replace(CONFIG, fewest=4, most=4, first_steps=6)
    free = replace(problem, suite=SUITE.model_copy(update={"guards": {}}))
    without = replace(
        free, references=References(tuple(i for i in problem.references.items if i.score_name != "guard"))
    )
    watched, unwatched = (
        losses_at(problem, descend(each, START, config).points[0].params, held_out=False)
        for each in (problem, without)
    )
    assert watched["guard"] < unwatched["guard"]
    ends = {}
    for name in ("first", "second"):
        suite = SUITE.model_dump(by_alias=True, exclude_none=True)
        suite["objectives"][name]["weight"] = 50.0
        own = replace(without, suite=SuiteConfig.model_validate(suite | {"guards": {}}))
        point = descend(own, START, replace(config, next_steps=0)).points[0]
        ends[name] = losses_at(problem, point.params, held_out=False)
    assert ends["first"]["first"] < ends["second"]["first"]
    assert ends["second"]["second"] < ends["first"]["second"]


@pytest.mark.parametrize("lead", [0.0, 0.005], ids=["alike", "one item of 200"])
def test_an_objective_that_no_known_model_is_better_at_does_not_rule(
    inputs: Inputs, engine: TransformersEngine, lead: float
) -> None:
    problem = problem_of(engine, inputs, space_of(inputs))
    values = {"base": 0.5, "expert-a": 0.5, "expert-b": 0.5 + lead}
    known = {
        name: replace(each, scores={**each.scores, "second": Score(values[name], 0.035, 200)})
        for name, each in problem.known.items()
    }
    half = {"first": Score(0.5, 0.1, 9), "second": Score(0.5 - lead, 0.035, 200), "guard": Score(1.0, 0.0, 9)}
    flat = replace(problem, known=known, scored=[(START, half)])
    both = replace(problem, scored=[(START, {**half, "second": half["first"]})])
    alone, together = (
        losses_at(problem, descend(each, START, CONFIG).points[0].params, held_out=False)
        for each in (flat, both)
    )
    assert alone["first"] <= together["first"]
    assert alone["second"] > together["second"]


@pytest.mark.parametrize("where_it_learns", [True, False])
def test_a_loss_that_is_not_finite_is_said(
    inputs: Inputs, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, where_it_learns: bool
) -> None:
    problem = problem_of(engine, inputs, space_of(inputs))
    monkeypatch.setattr(engine.model, "forward", overflowing(engine.model.forward, where_it_learns))
    with pytest.raises(TrialError, match=r"the loss of `first` must be finite, but got nan.*float32"):
        descend(problem, START, CONFIG)


def overflowing(forward: Callable[..., Any], where_it_learns: bool) -> Callable[..., Any]:
    """A model whose logits overflow, where it learns or everywhere else."""

    @functools.wraps(forward)
    def overflow(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if torch.is_grad_enabled() == where_it_learns:
            found.logits = found.logits * math.inf
        return found

    return overflow


def test_one_objective_takes_one_weighting(inputs: Inputs, engine: TransformersEngine) -> None:
    problem = problem_of(engine, inputs, space_of(inputs))
    suite = SUITE.model_copy(update={"objectives": {"first": SUITE.objectives["first"]}, "guards": {}})
    (point,) = descend(
        replace(problem, suite=suite, references=problem.references.only("first")), START, CONFIG
    ).points
    assert point.losses.keys() == {"first"}


def test_the_same_descent_gives_the_same_points(inputs: Inputs, engine: TransformersEngine) -> None:
    config, problem = (
        replace(CONFIG, first_steps=2, next_steps=1),
        problem_of(engine, inputs, space_of(inputs)),
    )
    assert descend(problem, START, config) == descend(problem, START, config)


def test_a_larger_budget_looks_at_more_items(inputs: Inputs, engine: TransformersEngine) -> None:
    problem = replace(problem_of(engine, inputs, space_of(inputs)), n_texts=100)
    config = replace(CONFIG, most=16, first_steps=2, next_steps=1, full_evaluations=2.0)
    found = descend(problem, START, config)
    assert 140 < found.n_passes <= 200


def test_densities_stay_and_coefficients_of_all_methods_descend_on_their_grid(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    config = replace(CONFIG, first_steps=2, next_steps=1)
    step = {"low": 0.0, "high": 2.0, "step": 0.25}
    ties = space_of(inputs, "ties", **{"lambda": step, "density": {"low": 0.2, "high": 0.8}})
    begin = {key: 0.5 for key in ties.distributions}
    points = descend(problem_of(engine, inputs, ties), begin, config).points
    assert points
    for point in points:
        assert all(value == 0.5 for key, value in point.params.items() if key.startswith("density"))
        own = [value for key, value in point.params.items() if key.startswith("lambda")]
        assert own != [0.5] * len(own)
        assert all(value % 0.25 == 0 for value in own)
    anchors = space_of(inputs, "slerp", groups=[], anchors=2)
    begin = {key: 0.5 for key in anchors.distributions}
    points = descend(problem_of(engine, inputs, anchors), begin, config).points
    assert points
    for point in points:
        assert point.params.keys() == {"t.anchor0", "t.anchor1"}
        assert point.params != begin


def test_the_scores_of_the_start_count_whatever_its_digits(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    """Thirds have no end, and 0.2 is no multiple of 0.01 above 0.1 in floating point."""
    grid = {"low": 0.1, "high": 1.0, "step": 0.01}
    space = space_of(inputs, "ties", density=grid, groups=[{"name": "all"}])
    start = {key: 0.2 if key.startswith("density") else 1 / 3 for key in space.distributions}
    found = []
    for value in (0.1, 0.9):
        scores = {**dict.fromkeys(SUITE.objectives, Score(value, 0.01, 1000)), "guard": Score(1.0, 0.0, 9)}
        problem = replace(problem_of(engine, inputs, space), scored=[(start, scores)])
        (*points,) = descend(problem, start, replace(CONFIG, first_steps=2, next_steps=1)).points
        assert points
        assert all(
            value == 0.2 for each in points for key, value in each.params.items() if key.startswith("density")
        )
        found.append(points)
    assert found[0] != found[1]


def test_a_coefficient_that_cannot_change_is_not_descended_on(
    inputs: Inputs, engine: TransformersEngine
) -> None:
    still = {"low": 0.5, "high": 0.5}
    space = space_of(inputs, groups=[GROUPS[0], {**GROUPS[1], "lambda": still}])
    assert {share.key for share in space.smooth_shares()} == {"lambda.layers.a", "lambda.layers.b"}
    for point in descend(problem_of(engine, inputs, space), START, CONFIG).points:
        assert point.params["lambda.rest.a"] == point.params["lambda.rest.b"] == 0.5
        assert point.params != START


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


def directed(folder: Path, engine: TransformersEngine, problem: Problem, **suite: Any) -> Problem:
    """The problem of a suite with the references of its items; every model known scores alike."""
    rules = {"description": "test", "chat_template": False, "holdout": 0.0, "include_path": "."}
    (folder / "suite.yaml").write_text(yaml.safe_dump(rules | suite))
    evaluator = Evaluator(read_suite(folder / "suite.yaml"))
    found = find_references(evaluator, cast(TemplateLM, engine.lm))
    alike = dict.fromkeys(evaluator.suite.config.scores, Score(0.5, 0.1, 9))
    known = {name: replace(each, scores=alike) for name, each in problem.known.items()}
    return replace(problem, suite=evaluator.suite.config, references=found, known=known, n_texts=1000)


@pytest.mark.parametrize("kind", TASKS_OF)
def test_objectives_that_differ_in_direction_alone_are_followed_opposite_ways(
    inputs: Inputs, engine: TransformersEngine, folder: Path, kind: str
) -> None:
    problem, wanted = problem_of(engine, inputs, space_of(inputs)), None
    likelier, less_likely = ("minimize", "maximize") if kind == "texts" else ("maximize", "minimize")
    moves, losses = [], []
    for direction in (likelier, less_likely):
        objective = {"direction": direction, "against_task": True, "tasks": [TASKS_OF[kind]]}
        own = directed(folder, engine, problem, objectives={"score": objective})
        wanted = wanted or own.references
        (point,) = descend(own, START, CONFIG).points
        moves.append(torch.tensor([point.params[key] - START[key] for key in START]))
        engine.load(own.space.recipe(point.params))
        losses.append(mean_losses(engine.model, wanted)["score"])
    assert wanted is not None
    engine.load(problem.space.recipe(START))
    assert losses[0] < mean_losses(engine.model, wanted)["score"] < losses[1]
    assert float(moves[0] @ moves[1]) < 0


@pytest.mark.parametrize("kind", TASKS_OF)
def test_guards_that_differ_in_direction_alone_turn_a_descent_opposite_ways(
    inputs: Inputs, engine: TransformersEngine, folder: Path, kind: str
) -> None:
    """Each is held against the expert that is better by it, so that both turn the descent."""
    problem, wanted = problem_of(engine, inputs, space_of(inputs)), None
    likelier, less_likely = ("minimize", "maximize") if kind == "texts" else ("maximize", "minimize")
    objective = {"tasks": [{"items": "other.jsonl", "scorer": "exact"}]}
    others = [json.dumps({"prompt": f"What is {i}?", "answer": "a number"}) for i in range(12)]
    (folder / "other.jsonl").write_text("\n".join(others))
    at_ends = []
    for direction in (likelier, less_likely):
        guard = {"direction": direction, "against_task": True, "tasks": [TASKS_OF[kind]], "margin": 0.1}
        own = directed(folder, engine, problem, objectives={"other": objective}, guards={"guard": guard})
        wanted = wanted or own.references.only("guard")
        own = replace(own, suite=held_against_the_best(own, own.references))
        for point in descend(own, START, replace(CONFIG, first_steps=6)).points[:1]:
            engine.load(own.space.recipe(point.params))
        at_ends.append(mean_losses(engine.model, wanted)["guard"])
    assert at_ends[0] < at_ends[1]


def held_against_the_best(problem: Problem, references: References) -> SuiteConfig:
    """The suite with a guard whose reference is the expert with the least loss by it."""
    losses = {}
    for name in ("a", "b"):
        problem.engine.load(problem.known[f"expert-{name}"].recipe)
        losses[name] = mean_losses(problem.engine.model, references)["guard"]
    reference = min(losses, key=lambda name: losses[name])
    held = problem.suite.guards["guard"].model_copy(update={"reference": reference})
    return problem.suite.model_copy(update={"guards": {"guard": held}})


# Costs


def few_references(n_objectives: int, n_items: int, n_choices: int) -> References:
    """So many objectives and a guard, with so many items each; the first objective's have choices."""
    generator = torch.Generator().manual_seed(0)

    def text() -> Scoring:
        return Scoring(torch.randint(3, 300, (8,), generator=generator).tolist(), 5)

    items = []
    for name in [*(f"o{i}" for i in range(n_objectives)), "guard"]:
        count = n_choices if name == "o0" else 1
        wanted, scales = ((0,), (1.0,) * count) if count > 1 else ((), ())
        for i in range(n_items):
            texts = tuple(text() for _ in range(count))
            items.append(Reference(name, "task", f"{name}-{i}", texts, wanted, scales))
    return References(tuple(items))


@pytest.mark.parametrize("n_items", [1, 2, 4, 6, 9, 15, 40])
@pytest.mark.parametrize(("n_objectives", "n_choices"), [(1, 1), (2, 1), (2, 5), (4, 2)])
def test_a_descent_costs_no_more_than_it_may_or_is_refused(
    inputs: Inputs,
    engine: TransformersEngine,
    monkeypatch: pytest.MonkeyPatch,
    n_items: int,
    n_objectives: int,
    n_choices: int,
) -> None:
    """The texts that go through the model are counted; with a backward pass one counts three times."""
    objectives = {f"o{i}": TASKS for i in range(n_objectives)}
    suite = SuiteConfig.model_validate(
        {**SUITE.model_dump(by_alias=True, exclude_none=True), "objectives": objectives}
    )
    own = few_references(n_objectives, n_items, n_choices)
    problem = problem_of(engine, inputs, space_of(inputs))
    alike = dict.fromkeys(suite.scores, Score(0.5, 0.1, 9))
    known = {name: replace(each, scores=alike) for name, each in problem.known.items()}
    problem = replace(problem, suite=suite, references=own, known=known, n_texts=own.n_texts)
    counted = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        counted.append(len(kwargs["input_ids"]) * (3 if torch.is_grad_enabled() else 1))
        return plain(*args, **kwargs)

    plain = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", functools.wraps(plain)(forward))
    if n_items < (4 if n_objectives == 1 else 6):
        with pytest.raises(MergetuneError, match=r"may cost up to 3 evaluations .* on so few items"):
            descend(problem, START)
        assert not counted
    else:
        found = descend(problem, START)
        assert found.n_passes == sum(counted)
        assert found.full_evaluations == found.n_passes / own.n_texts
        assert 1 < found.full_evaluations <= DescentConfig().full_evaluations


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
