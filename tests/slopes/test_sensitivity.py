"""Sensitivity on real small models, conflicts built on purpose, and where both are shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy import stats
from transformers import AutoModelForCausalLM

from helpers import mergetune
from mergetune.analysis.conflict_words import findings, with_error
from mergetune.analysis.conflicts import CLEAR, Conflict, conflicts, layer_gains, sensitivity_as_data
from mergetune.analysis.tables import sensitivity_tables
from mergetune.cli import app
from mergetune.engines.completions import Scoring
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.weight_gradients import each_gradient
from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import read_suite
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.report import gather
from mergetune.report.page import render
from mergetune.results.run_dir import RunDir
from mergetune.results.selection import choose
from mergetune.slopes.gradients import slopes
from mergetune.slopes.losses import item_losses
from mergetune.slopes.references import Reference, References
from mergetune.slopes.sensitivity import (
    anchor_points,
    fold_facts,
    measure_sensitivity,
    n_passes,
    slopes_by_group,
)
from mergetune.slopes.suite_sensitivity import suite_sensitivity
from mergetune.space.recipe import LayerGroup, MergeRecipe
from studies import write_study
from synthetic_run import GROUPS, Plan, sensitivity_frame, write_run

HALVES = (LayerGroup(name="layers", match=r"layers\."), LayerGroup(name="rest", match=r"^(?!.*layers\.)"))


def texts_of(score: str, task: str, count: int, seed: int) -> list[Reference]:
    """Random prompts with one reply, so that all items of a score gain by much the same change."""
    generator = torch.Generator().manual_seed(seed)
    reply = torch.randint(3, 300, (6,), generator=generator).tolist()
    prompts = [torch.randint(3, 300, (4,), generator=generator).tolist() for _ in range(count)]
    return [
        Reference(score, task, f"{task}{i}", (Scoring([*prompt, *reply], 4),))
        for i, prompt in enumerate(prompts)
    ]


REFERENCES = References(
    (
        *texts_of("one", "t1", 9, seed=1),
        *texts_of("two", "t2", 6, seed=2),
        *texts_of("two", "t3", 6, seed=3),
    )
)


@pytest.fixture(scope="module")
def measured(engine: TransformersEngine, inputs: Inputs) -> pd.DataFrame:
    points = anchor_points(inputs.base_source, inputs.expert_sources)
    return measure_sensitivity(engine, inputs.merger, points, REFERENCES, n_items=8)


# Measured and added up


def test_the_mean_over_folds_is_the_slope_on_all_items(
    engine: TransformersEngine, inputs: Inputs, measured: pd.DataFrame
) -> None:
    found = slopes_by_group(measured, HALVES)
    assert list(found["group"].unique()) == ["layers", "rest"]
    keys = ["score_name", "group", "parameter", "expert"]
    for point, recipe in anchor_points(inputs.base_source, inputs.expert_sources).items():
        whole = slopes(engine, inputs.merger, recipe, REFERENCES.sample(8)).by_group(HALVES)
        own = found[found["point"] == point].set_index(keys)["slope"].sort_index()
        expected = whole.set_index(keys)["slope"].sort_index()
        pd.testing.assert_series_equal(own, expected, rtol=1e-4, atol=1e-6)


def test_standard_errors_are_those_of_the_folds(measured: pd.DataFrame) -> None:
    found = slopes_by_group(measured, HALVES)
    for row in found.to_dict("records"):
        key = ["point", "score_name", "expert"]
        own = measured[(measured[key] == [row[name] for name in key]).all(axis=1)]
        inside = own["tensor"].str.contains(r"layers\.") == (row["group"] == "layers")
        by_fold = own[inside].groupby("fold")["slope"].sum()
        assert row["slope"] == pytest.approx(by_fold.mean())
        assert row["stderr"] == pytest.approx(stats.sem(by_fold))
    once = slopes_by_group(measured[measured["fold"] == 0], HALVES)
    assert once["stderr"].isna().all()


def test_folds_share_no_item_and_spread_over_tasks(measured: pd.DataFrame, inputs: Inputs) -> None:
    facts = fold_facts(measured)
    assert set(facts["n_items"]) == {2}
    assert len(facts) == 2 * 2 * 4  # points, scores, folds
    assert n_passes(measured) == 3 * 2 * 16  # a backward pass is two, at two points, on 16 items
    assert (facts["loss"] > 0).all()


def test_a_score_with_fewer_items_than_folds_has_a_fold_for_each(
    engine: TransformersEngine, inputs: Inputs
) -> None:
    few = References((*texts_of("one", "t1", 9, seed=1), *texts_of("two", "t2", 3, seed=2)))
    points = {"base": anchor_points(inputs.base_source, inputs.expert_sources)["base"]}
    facts = fold_facts(measure_sensitivity(engine, inputs.merger, points, few, n_items=6))
    sizes = {str(name): list(own["n_items"]) for name, own in facts.groupby("score_name")}
    assert sizes == {"one": [1, 2, 1, 2], "two": [1, 1, 1]}


def test_a_point_whose_method_has_no_slopes_is_left_out(engine: TransformersEngine, inputs: Inputs) -> None:
    sce = MergeRecipe.of_one_group("sce", inputs.base_source, inputs.expert_sources, {"select_topk": 0.5})
    slerp = MergeRecipe.of_one_group("slerp", inputs.base_source, inputs.expert_sources, {"t": 0.5})
    found = measure_sensitivity(
        engine, inputs.merger, {"average": sce, "recommended": slerp}, REFERENCES, n_items=4
    )
    assert set(found["point"]) == {"recommended"}
    assert set(found["parameter"]) == {"t"}
    assert set(layer_gains(found)["coefficient"]) == {"t"}  # one for all experts
    nothing = measure_sensitivity(engine, inputs.merger, {"average": sce}, REFERENCES, n_items=4)
    assert nothing.empty


# Conflicts


def gradient(model: Any, score: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    names = [name for name, _ in model.named_parameters()]
    with each_gradient(model, names, lambda name, own: found.update({name: own.clone()})):
        item_losses(model, REFERENCES.by_score[score]).mean().backward()  # type: ignore[no-untyped-call]
    return found


@pytest.fixture(scope="module")
def torn(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """One expert, the base moved against the gradient of `one`'s loss and along that of `two`'s."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    one, two = gradient(model, "one"), gradient(model, "two")
    sizes = [math.sqrt(sum(float(each.square().sum()) for each in own.values())) for own in (one, two)]
    folder = tmp_path_factory.mktemp("torn") / "torn"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_base / "config.json").read_text())
    tensors = {
        name: tensor + 0.1 * (two[name] / sizes[1] - one[name] / sizes[0])
        for name, tensor in load_file(tiny_base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_inputs(tiny_base, {"torn": folder})


def test_an_expert_that_helps_one_score_and_harms_the_other_is_found_and_named(torn: Inputs) -> None:
    engine = TransformersEngine(EngineConfig(device="cpu"), torn.base.folder, torn.merger)
    points = {"base": anchor_points(torn.base_source, torn.expert_sources)["base"]}
    frame = measure_sensitivity(engine, torn.merger, points, REFERENCES, n_items=8)
    engine.close()
    (found,) = conflicts(frame, HALVES)
    assert found.kind == "strong"
    assert found.cosine < -0.9
    assert found.share == pytest.approx(1, abs=0.2)
    assert {(place.group, place.expert) for place in found.places} == {("layers", "torn"), ("rest", "torn")}
    assert all(place.first.value < 0 < place.second.value for place in found.places)
    first, *others = findings("base", [found])
    assert first.sentence.startswith("`one` and `two` conflict: ")
    assert "More of `torn` in `layers` helps `one` (+" in " ".join(first.details)
    assert any("retrain one model on the data of both" in each.sentence for each in others)


@pytest.mark.parametrize("scorer", ["choice", "exact"])
def test_scores_that_differ_in_direction_alone_have_opposite_gains_and_are_in_conflict(
    inputs: Inputs, tmp_path: Path, scorer: str
) -> None:
    item = {"answer": 0, "choices": ["y", "n"]} if scorer == "choice" else {"answer": "yes"}
    lines = [json.dumps({"prompt": f"Is it so, number {i}?", **item}) for i in range(24)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    tasks = [{"items": "items.jsonl", "scorer": scorer}]
    again = [{"items": "./items.jsonl", "scorer": scorer}]
    suite = {
        "description": "test",
        "chat_template": False,
        "holdout": 0.0,
        "objectives": {"more": {"tasks": tasks}},
        "guards": {"less": {"tasks": again, "direction": "minimize", "margin": 0.1}},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    frame = suite_sensitivity(inputs, read_suite(tmp_path / "suite.yaml"), EngineConfig(device="cpu"), print)
    gains = layer_gains(frame).set_index(["point", "layer", "coefficient"])
    more, less = (gains[gains["score_name"] == name] for name in ("more", "less"))
    assert (np.sign(more["gain"]) == -np.sign(less["gain"])).all()
    assert more.loc[more["is_clear"] & less["is_clear"], "opposed"].eq("less").all()
    for each in conflicts(frame, HALVES):
        assert each.cosine == pytest.approx(-1, abs=0.01)
        assert each.kind == "strong"


def frame_of(folds: dict[str, list[list[float]]]) -> pd.DataFrame:
    """Slopes by score, fold and coefficient: experts a, b … of one tensor."""
    return pd.DataFrame(
        {
            "point": "average",
            "score_name": score,
            "fold": fold,
            "n_items": 3,
            "n_passes": 9,
            "loss": 1.0,
            "tensor": "lm_head.weight",
            "parameter": "lambda",
            "expert": expert,
            "slope": value,
        }
        for score, own in folds.items()
        for fold, values in enumerate(own)
        for expert, value in zip("abcdef", values, strict=False)
    )


def conflict_of(**folds: list[list[float]]) -> Conflict:
    (found,) = conflicts(frame_of(folds), [LayerGroup(name="all")])
    return found


def test_cosine_pull_and_shares_are_what_the_formulas_give() -> None:
    rng = np.random.default_rng(0)
    one = np.array([-2.0, 1.0, 0.5]) + 0.1 * rng.normal(size=(4, 3))
    two = np.array([0.5, 1.0, -0.7]) + 0.1 * rng.normal(size=(4, 3))
    found = conflict_of(one=one.tolist(), two=two.tolist())
    a, b = one.mean(axis=0), two.mean(axis=0)

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert found.cosine == pytest.approx(cosine(a, b))
    left_out = [cosine(np.delete(one, i, 0).mean(axis=0), b) for i in range(4)]
    left_out_two = [cosine(a, np.delete(two, i, 0).mean(axis=0)) for i in range(4)]
    variance = 0.75 * sum(((np.array(own) - np.mean(own)) ** 2).sum() for own in (left_out, left_out_two))
    assert found.cosine_stderr == pytest.approx(math.sqrt(variance))
    assert found.first.total == pytest.approx(np.abs(a).sum())
    assert {place.expert for place in found.places} == {"a", "c"}
    shares = [np.abs(own) / np.abs(own).sum() for own in (a, b)]
    assert found.share == pytest.approx(np.minimum(*shares)[[0, 2]].sum())
    assert found.places[0].share >= found.places[1].share


@pytest.mark.parametrize(
    ("two", "kind", "says"),
    [
        ([1.0, -1.0], "strong", "conflict: 100% of the gradient conflicts"),
        ([1.0, 1.0], "partial", "conflict in part: 50% of"),
        ([-1.0, 1.0], "none", "Little or nothing conflicts by layer groups between"),
        (
            [-1.0, -0.05],
            "none",
            "Little or nothing conflicts by layer groups between",
        ),  # too little is at stake
    ],
)
def test_the_kind_follows_what_is_opposed(two: list[float], kind: str, says: str) -> None:
    found = conflict_of(one=[[-1.0, 1.0]] * 2, two=[two] * 2)
    assert found.kind == kind
    assert says in findings("average", [found])[0].sentence


def test_what_lies_within_the_noise_is_no_conflict() -> None:
    noisy = [[1.0 + 4 * sign, -1.0 - 4 * sign] for sign in (-1, 1)]
    found = conflict_of(one=[[-1.0, 1.0]] * 2, two=noisy)
    assert (found.kind, found.places) == ("unclear", ())
    said = findings("average", [found])
    assert "Too noisy to tell" in said[0].sentence
    assert "Too few items" in said[-1].sentence
    once = conflict_of(one=[[-1.0, 1.0]], two=[[1.0, -1.0]])  # one fold: the noise is unknown
    assert (once.kind, once.places, once.cosine_stderr) == ("unclear", (), None)


def test_noise_alone_is_nearly_always_unclear_and_never_a_strong_conflict() -> None:
    rng = np.random.default_rng(1)
    kinds = [
        conflict_of(**{name: rng.normal(size=(4, 6)).tolist() for name in ("one", "two")}).kind
        for _ in range(30)
    ]
    assert kinds.count("unclear") >= 27
    assert kinds.count("strong") == 0


def test_each_point_says_what_its_slopes_can_say() -> None:
    found = conflict_of(one=[[-1.0, 1.0]] * 2, two=[[1.0, -1.0]] * 2)
    at_base, at_merge = (
        " ".join(each.sentence for each in findings(point, [found])) for point in ("base", "recommended")
    )
    assert "what the first bit of each task vector does" in at_base
    assert "not that merging failed" in at_merge
    assert "retrain" not in at_merge  # on the front opposed pulls are the rule


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (2.1349, 0.312, "+2.13 ± 0.31"),
        (-0.0074, 0.0015, "−0.0074 ± 0.0015"),
        (53.123, 0.002, "+53.1 ± 0.0"),
        (1234.5, 67.0, "+1234 ± 67"),
        (-0.0, 0.0, "+0.000000 ± 0.000000"),
        (0.5, math.nan, "+0.500 ± ?"),
    ],
)
def test_figures_are_as_exact_as_their_errors(value: float, stderr: float, text: str) -> None:
    assert with_error(value, stderr) == text


# Where it is shown


def test_tables_mark_what_is_in_conflict() -> None:
    frame = frame_of({"one": [[-1.0, 2.0]] * 2, "two": [[3.0, 4.0]] * 2})
    groups = [LayerGroup(name="all")]
    console = Console(width=80)
    with console.capture() as capture:
        for table in sensitivity_tables(slopes_by_group(frame, groups), conflicts(frame, groups)):
            console.print(table)
    first, second = (line for line in capture.get().splitlines() if "±" in line)
    assert first.split()[:2] == ["all", "a"]
    assert second.split()[0] == "b"  # the group is named once
    assert first.count("!") == 2
    assert second.count("!") == 0
    assert "+1.00" in first
    assert "−3.00" in first


def test_data_for_json_holds_no_nan() -> None:
    frame = frame_of({"one": [[-1.0, 2.0]], "two": [[3.0, 4.0]]})
    data = json.loads(json.dumps(sensitivity_as_data(frame, [LayerGroup(name="all")]), allow_nan=False))
    assert data["slopes"][0]["stderr"] is None
    assert data["conflicts"][0]["kind"] == "unclear"


def test_the_run_directory_keeps_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.sensitivity() is None
    frame = sensitivity_frame({"base": 1.0})
    run.write_sensitivity(frame)
    found = run.sensitivity()
    assert found is not None
    pd.testing.assert_frame_equal(found, frame)


def test_the_report_shows_maps_and_conflicts_of_each_point(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", Plan(n_trials=3, holdout=False))
    assert gather(run).sensitivity is None
    choice = choose(run)
    assert choice is not None
    assert choice.recommendation is not None
    candidate = run.candidate(choice.recommendation.name)
    assert candidate is not None
    scales = {"base": 1.0, "average": 0.6, "recommended": 0.1}
    run.write_sensitivity(sensitivity_frame(scales))  # at a merge that was recommended once
    before = gather(run).sensitivity
    assert before is not None
    assert [each.point for each in before.points] == ["average", "base"]
    run.write_sensitivity(sensitivity_frame(scales, {"recommended": candidate.recipe.digest}))
    data = gather(run)
    found = data.sensitivity
    assert found is not None
    assert [each.point for each in found.points] == ["recommended", "average", "base"]
    page = render(data)
    assert "<h2>Sensitivity</h2>" in page
    assert "12 of <code>tool_calls</code>" in page
    assert "Green: raising this expert" in page
    assert "grey: within two standard errors of zero" in page
    assert "The sentences judge whole\n  layer groups" in page
    worst = found.points[1].conflicts[0]
    assert (worst.first.score_name, worst.second.score_name) == ("tool_calls", "persona")
    assert worst.kind == "partial"
    assert worst.places[0].expert == "persona"
    assert worst.places[0].group in {str(group["name"]) for group in GROUPS}  # those of the search space
    assert "More of <code>persona</code> in <code>late-" in page


def test_gains_of_layers_turn_slopes_and_mark_conflicts() -> None:
    frame = sensitivity_frame({"average": 1.0})
    layers = layer_gains(frame)
    assert list(layers["layer"].unique()) == ["outside", *map(str, range(30))]
    own = layers.set_index(["score_name", "layer", "coefficient"])
    assert own.loc[("tool_calls", "24", "persona"), "gain"] == pytest.approx(-5 * 0.3, abs=0.1)
    assert own.loc[("tool_calls", "24", "persona"), "opposed"] == "persona"
    assert "tool_calls" in str(own.loc[("persona", "24", "persona"), "opposed"])
    clear = layers["gain"].abs() > CLEAR * layers["stderr"]
    assert (clear == layers["is_clear"]).all()


def test_inspect_measures_a_suite(tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]) -> None:
    write_study(tmp_path, tiny_base, tiny_experts)
    chart = tmp_path / "chart.svg"
    command = ["inspect", tiny_base, *tiny_experts.values(), "--suite", tmp_path / "suite.yaml"]
    done = mergetune(*command, "--batch-size", 4, "--json", "--chart", chart)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)["sensitivity"]
    scores = {row["score_name"] for row in data["slopes"]}
    assert {"parity", "calm"} <= scores
    assert {row["point"] for row in data["slopes"]} == {"base", "average"}
    assert data["n_passes"] > 0
    assert {"cosine", "kind", "opposed", "places"} <= data["conflicts"][0].keys()
    assert "At the uniform average" in chart.read_text()
    assert "words" in scores or "`words:words.jsonl` has no references" in done.stderr


def test_inspect_prints_gains_and_says_what_they_mean(
    tmp_path: Path,
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_study(tmp_path, tiny_base, tiny_experts)
    command = ["inspect", str(tiny_base), *map(str, tiny_experts.values())]
    app([*command, "--suite", str(tmp_path / "suite.yaml")], standalone_mode=False)
    printed = capsys.readouterr().out
    for text in ("At the base", "At the uniform average", "All this rests on few items", "forward passes"):
        assert text in printed
    with pytest.raises(MergetuneError, match="--batch-size 4 goes with --suite"):
        app([*command, "--batch-size", "4"], standalone_mode=False)


def test_inspect_says_what_is_missing_where_no_item_has_a_reference(inputs: Inputs, tmp_path: Path) -> None:
    hard = {"items": "words.jsonl", "scorer": "regex", "max_new_tokens": 2}
    suite = {"description": "test", "chat_template": True, "objectives": {"words": {"tasks": [hard]}}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    items = [{"prompt": f"Say {i}.", "patterns": ["never said"]} for i in range(6)]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, items)))
    said: list[str] = []
    with pytest.raises(MergetuneError, match="none has an answer, and no expert replies well"):
        suite_sensitivity(inputs, read_suite(tmp_path / "suite.yaml"), EngineConfig(), said.append)
    assert [line.split(" to ")[0] for line in said[:2]] == [f"replies of {name}" for name in "ab"]
    assert "`words:words.jsonl` has no references" in said[2]
