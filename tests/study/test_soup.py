"""Model soups: the greedy rule, its place in a study, and the command."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mergekit.merge_methods import merge_state_dicts
from rich.console import Console

from helpers import fine_tune, merge_with_peft, mergetune
from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.report import gather, write_report
from mergetune.results import roles, selection
from mergetune.results.roles import average_name, role_of
from mergetune.results.run_dir import RunDir
from mergetune.space.recipe import MergeRecipe
from mergetune.study.soup import SoupResult, Standing, greedy_soup, make_soup, standing
from mergetune.study.soup_plan import SoupPlan, _names, last_checkpoints
from mergetune.weights.checkpoint import Checkpoint
from scored_models import MODELS, scales, scores, suite
from studies import run, write_study
from synthetic_run import Plan, write_run

NAMES = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)
STANDINGS = st.builds(Standing, st.sampled_from([0.0, -0.1, -0.2]), st.floats(-2, 2))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def mean_of(*models: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([model[name] for model in models]).mean(dim=0) for name in models[0]}


def assert_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)


# The greedy rule


@given(st.data(), NAMES)
def test_a_greedy_soup_is_never_worse_than_its_best_ingredient(data: st.DataObject, names: list[str]) -> None:
    alone = {name: data.draw(STANDINGS) for name in names}
    measured: dict[tuple[str, ...], Standing] = {}

    def measure(members: tuple[str, ...]) -> Standing:
        assert members not in measured  # nothing is measured twice
        return measured.setdefault(members, data.draw(STANDINGS))

    soup = greedy_soup(alone, measure)
    assert soup.standing >= max(alone.values())
    assert soup.standing == (alone[soup.members[0]] if len(soup.members) == 1 else measured[soup.members])
    assert len(measured) == len(soup.attempts) == len(names) - 1
    assert set(soup.members) <= set(names)


def test_ingredients_come_from_the_best_down_and_stay_if_the_soup_does_not_get_worse() -> None:
    alone = {"c": Standing(0, 0.5), "a": Standing(0, 0.9), "b": Standing(0, 0.7), "d": Standing(0, 0.1)}
    gains = {("a", "b"): 0.8, ("a", "c"): 0.9, ("a", "c", "d"): 1.0}
    soup = greedy_soup(alone, lambda members: Standing(0, gains[members]))
    assert soup.members == ("a", "c", "d")
    assert [(attempt.members[-1], attempt.is_kept) for attempt in soup.attempts] == [
        ("b", False),
        ("c", True),
        ("d", True),
    ]


def test_a_soup_that_breaks_a_guard_is_not_kept_unless_the_present_one_breaks_it_too() -> None:
    alone = {"a": Standing(0, 0.5), "b": Standing(-0.2, 0.9)}
    assert greedy_soup(alone, lambda _: Standing(-0.1, 0.9)).members == ("a",)
    alone = {"a": Standing(-0.1, 0.5), "b": Standing(-0.2, 0.9)}
    assert greedy_soup(alone, lambda _: Standing(-0.05, 0.3)).members == ("a", "b")
    assert greedy_soup(alone, lambda _: Standing(-0.15, 0.9)).members == ("a",)


SCALES = scales(MODELS, suite())


def test_a_standing_weighs_the_shares_kept_of_the_experts_gains() -> None:
    assert standing(MODELS["expert-a"], MODELS, suite(), SCALES) == pytest.approx((0.0, 0.5))
    assert standing(scores(0.5, 0.5), MODELS, suite(), SCALES) == pytest.approx((0.0, (0.5 + 0.75) / 2))
    heavy = suite(x={"weight": 3.0}, y={})
    assert standing(scores(0.5, 0.5), MODELS, heavy, SCALES) == pytest.approx((0.0, (3 * 0.5 + 0.75) / 4))
    assert standing(scores(0.5, 0.5, g=0.7), MODELS, suite(), SCALES).allowance == pytest.approx(-1)


def test_a_soup_that_meets_a_guard_exactly_keeps_it() -> None:
    for right in range(1, 21):
        models = {**MODELS, "base": scores(0.1, 0.2, g=right / 20)}
        own = scales(models, suite())
        assert standing(scores(0.5, 0.5, g=(right - 1) / 20), models, suite(), own).allowance == 0
        assert standing(scores(0.5, 0.5, g=(right - 2) / 20), models, suite(), own).allowance < 0


def test_a_lead_of_an_item_does_not_rule_a_standing() -> None:
    models = {"base": scores(0.1, 0.5), "expert-a": scores(0.9, 0.5), "expert-b": scores(0.1, 0.505)}
    own = scales(models, suite(), stderr=0.03)
    full, poor = (standing(each, models, suite(), own) for each in (scores(0.9, 0.495), scores(0.17, 0.505)))
    assert full > poor


def test_without_a_base_a_standing_is_the_mean_of_the_scores() -> None:
    models = {"expert-a": scores(0.9, 0.2), "expert-b": scores(0.1, 0.6)}
    config = suite(x={"direction": "minimize"}, y={"weight": 3.0}).model_copy(update={"guards": {}})
    assert standing(scores(0.4, 0.8), models, config, SCALES) == pytest.approx((0.0, (-0.4 + 3 * 0.8) / 4))


def test_one_set_of_experts_has_one_name() -> None:
    experts = ["a", "b", "c"]
    assert average_name(["b"], experts) == roles.expert_name("b")
    assert average_name(["c", "a"], experts) == average_name(["a", "c"], experts) == "soup-a+c"
    assert average_name(["c", "a", "b"], experts) == "average-0.33"
    many = [f"checkpoint-{step}" for step in range(1000, 9000, 500)]
    long = {average_name(many[:size], many) for size in range(5, 15)}
    assert len(long) == 10
    assert all(role_of(name) == "soup" and len(name) < 60 for name in long)


# In a study


@pytest.fixture(scope="module")
def experts(tiny_experts: dict[str, Path], tiny_adapter: Path) -> dict[str, Path]:
    return {**tiny_experts, "lora": tiny_adapter}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, experts: dict[str, Path]) -> RunDir:
    folder = tmp_path_factory.mktemp("soup-study")
    run(write_study(folder, tiny_base, experts, budget={"trials": 1}), folder / "run")
    return RunDir(folder / "run")


def test_a_study_of_three_experts_measures_the_greedy_soup(finished: RunDir) -> None:
    measured = finished.all_scores("search")
    config = finished.study.suite_config
    names = list(finished.study.experts)
    own = selection.scales_of(finished, ["base", *(f"expert-{name}" for name in names)])
    alone = {name: standing(measured[f"expert-{name}"], measured, config, own) for name in names}
    tried: set[str] = set()

    def measure(members: tuple[str, ...]) -> Standing:
        tried.add(average_name(members, names))
        return standing(measured[average_name(members, names)], measured, config, own)

    soup = greedy_soup(alone, measure)
    assert tried - {"average-0.33"} == {name for name in measured if role_of(name) == "soup"}
    assert tried - {"average-0.33"}  # two experts of three are always tried
    assert finished.scores(average_name(soup.members, names), "holdout") is not None
    digests = [candidate.recipe.digest for candidate in finished.candidates()]
    assert len(set(digests)) == len(digests)  # no weights were measured twice


def test_soups_are_baselines_that_teach_the_sampler(finished: RunDir) -> None:
    candidates = finished.candidates()
    assert candidates[-1].name == "trial-0001"
    for candidate in (candidate for candidate in candidates if role_of(candidate.name) == "soup"):
        shares = sorted(candidate.recipe.groups[0].per_expert("lambda").values())
        assert candidate.is_baseline
        assert shares == [0.0, 0.5, 0.5]
        assert candidate.params is not None


def test_the_report_shows_soups_among_the_averages(finished: RunDir) -> None:
    entries = [entry for entry in gather(finished).entries if role_of(entry.name) == "soup"]
    assert entries
    assert {entry.role for entry in entries} == {"average"}
    page = write_report(finished).read_text()
    assert all(f"<th>{entry.name}" in page for entry in entries)


def test_a_study_goes_on_from_the_soups_that_it_measured(finished: RunDir, tmp_path: Path) -> None:
    copy = RunDir(Path(shutil.copytree(finished.path, tmp_path / "run")))
    lost = next(name for name in copy.all_scores("search") if role_of(name) == "soup")
    before = copy.measurement(lost, "search")
    for file in (copy.path / "candidates").glob(f"{lost}.*"):
        file.unlink()
    kept = {file.name: file.stat().st_mtime_ns for file in (copy.path / "candidates").iterdir()}
    run(finished.path / "study.yaml", copy.path)
    after = copy.measurement(lost, "search")
    assert before is not None
    assert after is not None
    assert after.equals(before)
    times = {name: (copy.path / "candidates" / name).stat().st_mtime_ns for name in kept}
    assert times == kept


def test_two_experts_and_their_average_decide_the_soup(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    run(write_study(tmp_path, tiny_base, tiny_experts, budget={"trials": 0}), tmp_path / "run")
    assert not [name for name in RunDir(tmp_path / "run").all_scores("search") if role_of(name) == "soup"]


def test_the_verdict_calls_a_soup_a_soup(tmp_path: Path) -> None:
    found = write_run(tmp_path / "run", Plan(n_baselines=4, n_trials=0, holdout=False))
    average = next(c for c in found.candidates() if c.name.startswith("average-"))
    items = found.measurement(average.name, "search")
    assert items is not None
    assert f"the average `{average.name}`" in gather(found).verdict.headline
    for file in (found.path / "candidates").glob(f"{average.name}.*"):
        file.rename(file.with_name(file.name.replace(average.name, "soup-tools+persona")))
    soup = average.model_copy(update={"name": "soup-tools+persona"})
    found.write_candidate(soup, None)
    assert "the soup `soup-tools+persona`" in gather(found).verdict.headline


# The command


def soup_of(out: Path, models: list[Path], **options: Any) -> tuple[SoupResult | None, str]:
    """Make a soup; returns what was measured for it, and what was printed."""
    printed = io.StringIO()
    plan = SoupPlan.read(
        out, [str(model) for model in models], engine=EngineConfig(kind="transformers"), **options
    )
    run_folder = RunDir(out.with_name(f"{out.name}.soup"))
    return make_soup(plan, run_folder, Console(file=printed, width=200)), printed.getvalue()


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[Path]:
    """Three training runs of one kind."""
    folder = tmp_path_factory.mktemp("variants")
    return [fine_tune(tiny_base, folder / f"v{seed}", seed=seed, std=0.02) for seed in range(3)]


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The suite of the studies, without its guard."""
    folder = tmp_path_factory.mktemp("suite")
    write_study(folder, tiny_base, {})
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"guards": {}}))
    return file


@pytest.fixture
def training_run(tmp_path: Path, variants: list[Path]) -> Path:
    """What Trainer leaves behind: checkpoints whose names do not sort by step, and other things."""
    folder = tmp_path / "training"
    for step, model in zip((9, 10, 100), variants, strict=True):
        shutil.copytree(model, folder / f"checkpoint-{step}")
    (folder / "runs").mkdir()
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-999").touch()
    return folder


def test_a_uniform_soup_is_the_mean_of_the_weights(tmp_path: Path, variants: list[Path]) -> None:
    result, _ = soup_of(tmp_path / "out", variants)
    assert result is None
    found = weights_of(tmp_path / "out")
    assert_same(found, mean_of(*map(weights_of, variants)))
    states = {model.name: weights_of(model) for model in variants}
    assert_same(found, merge_state_dicts(states, "linear", parameters={"weight": [1.0] * 3}, base=None))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert MergeRecipe.read(tmp_path / "out" / "recipe.yaml").method == "linear"
    assert "v2" in (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in yaml.safe_load((tmp_path / "out" / "mergekit.yaml").read_text())
    assert not (tmp_path / "out.soup").exists()


def test_a_soup_of_adapters_takes_their_base(
    tmp_path: Path, tiny_base: Path, tiny_adapter: Path, tiny_experts: dict[str, Path]
) -> None:
    models = [tiny_adapter, tiny_experts["a"]]
    with pytest.raises(MergetuneError, match=r"is an adapter\. Name the model it belongs to with --base"):
        soup_of(tmp_path / "out", models)
    soup_of(tmp_path / "out", models, base=str(tiny_base))
    theirs = merge_with_peft(tiny_base, tiny_adapter)
    found = weights_of(tmp_path / "out")
    assert_same(found, mean_of({n: theirs[n] for n in found}, weights_of(tiny_experts["a"])))


def test_last_takes_the_last_checkpoints_by_number(
    tmp_path: Path, training_run: Path, variants: list[Path]
) -> None:
    assert [path.name for path in last_checkpoints(training_run, 2)] == ["checkpoint-10", "checkpoint-100"]
    soup_of(tmp_path / "out", [training_run], last=2)
    assert_same(weights_of(tmp_path / "out"), mean_of(*map(weights_of, variants[1:])))


def test_too_few_checkpoints_are_counted_in_the_message(tmp_path: Path, training_run: Path) -> None:
    with pytest.raises(MergetuneError, match=r"there are 3 \(checkpoint-9, checkpoint-10, checkpoint-100\)"):
        last_checkpoints(training_run, 4)
    with pytest.raises(MergetuneError, match=r"there are 0 \(none\)"):
        last_checkpoints(tmp_path, 2)
    with pytest.raises(MergetuneError, match="is no directory"):
        last_checkpoints(tmp_path / "absent", 2)


def test_a_greedy_soup_is_chosen_measured_once_and_written(
    tmp_path: Path, variants: list[Path], suite_file: Path
) -> None:
    result, printed = soup_of(tmp_path / "out", variants, suite=str(suite_file))
    assert result is not None
    soup = result.soup
    measured = [row.standing for row in result.rows if row.label in {model.name for model in variants}]
    assert len(measured) == len(variants)
    assert soup.standing >= max(measured)
    assert "expert-v1" in printed
    assert f"holdout: {average_name(soup.members, ['v0', 'v1', 'v2'])}" in printed
    chosen = [weights_of(model) for model in variants if model.name in soup.members]
    assert_same(weights_of(tmp_path / "out"), mean_of(*chosen))
    assert set(MergeRecipe.read(tmp_path / "out" / "recipe.yaml").experts) == set(soup.members)
    assert "| words |" in (tmp_path / "out" / "README.md").read_text()
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out.soup" / "candidates").iterdir()}
    last = average_name(soup.attempts[-1].members, ["v0", "v1", "v2"])
    for file in (tmp_path / "out.soup" / "candidates").glob(f"{last}.*"):  # as if killed before it
        file.unlink()
        del files[file.name]
    again, printed = soup_of(tmp_path / "out", variants, suite=str(suite_file))
    assert again == result
    assert f"\n{last} " in printed
    assert "expert-v1 " not in printed
    after = {name: (tmp_path / "out.soup" / "candidates" / name).stat().st_mtime_ns for name in files}
    assert after == files


def test_what_cannot_be_measured_on_the_split_chosen_on_is_an_error(
    tmp_path: Path, variants: list[Path], suite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TrialError("out of range")

    monkeypatch.setattr(Evaluator, "measure_documents", fail)
    with pytest.raises(MergetuneError, match=r"`expert-v0` cannot be measured: out of range"):
        soup_of(tmp_path / "out", variants[:2], suite=str(suite_file), split="holdout")
    assert "out of range" in (tmp_path / "out.soup" / "run.log").read_text()


def test_splits_are_measured_once_and_scored_together(
    tmp_path: Path, variants: list[Path], suite_file: Path
) -> None:
    tastings = {}
    for split in ("holdout", "search", "all"):
        tastings[split], printed = soup_of(tmp_path / "out", variants[:2], suite=str(suite_file), split=split)
    assert "expert-" not in printed  # both splits were measured by then
    found = RunDir(tmp_path / "out.soup")
    (search, holdout, both) = (tastings[split] for split in ("search", "holdout", "all"))
    assert search is not None
    assert holdout is not None
    assert both is not None
    for name, own in both.scores.items():
        assert search.scores[name] == found.scores(name, "search")
        assert holdout.scores[name] == found.scores(name, "holdout")
        for key, score in own.items():
            assert score.n_items == search.scores[name][key].n_items + holdout.scores[name][key].n_items
    candidates = found.candidates()
    assert [candidate.number for candidate in candidates] == [0, 1, 2]
    assert all(c.cost.n_items > 0 and c.holdout_cost.n_items > 0 for c in candidates)


def test_with_a_base_guards_count_and_the_run_has_a_report(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], tiny_adapter: Path
) -> None:
    write_study(tmp_path, tiny_base, {})
    models = [*tiny_experts.values(), tiny_adapter]
    options: dict[str, Any] = {"suite": str(tmp_path / "suite.yaml")}
    with pytest.raises(
        MergetuneError, match=r"the guard `calm` compares with the base\. Name it with --base"
    ):
        soup_of(tmp_path / "out", models[:2], **options)
    result, _ = soup_of(tmp_path / "out", models, base=str(tiny_base), **options)
    assert result is not None
    assert result.rows[0].label == "base"
    assert result.rows[0].standing.allowance == 0
    page = write_report(RunDir(tmp_path / "out.soup")).read_text()
    assert "Scores" in page


def test_what_a_soup_is_made_of_is_never_replaced(tmp_path: Path, training_run: Path) -> None:
    (training_run / "config.json").write_text("{}")  # Trainer saves the last model beside the checkpoints
    with pytest.raises(MergetuneError, match=r"would be replaced, but holds .*checkpoint-10"):
        soup_of(training_run, [training_run], last=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(MergetuneError, match="exists and is no model directory"):
        soup_of(tmp_path / "notes", [training_run], last=2)
    assert len(list(training_run.iterdir())) == 7
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["v0"], {}, "two models or more"),
        (["v0", "v0"], {}, "must differ"),
        (["v0", "absent"], {}, "there is no such model directory"),
        (["v0", "v1"], {"last": 2}, "the folder of one training run, but got 2"),
        (["v0", "v1"], {"suite": "absent.yaml"}, "there is no such file"),
    ],
)
def test_a_wrong_soup_is_explained_before_any_work(
    tmp_path: Path, variants: list[Path], models: list[str], options: dict[str, Any], message: str
) -> None:
    folder = variants[0].parent
    with pytest.raises(MergetuneError, match=message):
        SoupPlan.read(tmp_path / "out", [str(folder / model) for model in models], **options)
    assert not (tmp_path / "out").exists()


def test_models_of_the_same_name_are_told_apart_by_their_folders(
    tmp_path: Path, variants: list[Path]
) -> None:
    models = [tmp_path / run / "checkpoint-1.5" for run in ("first", "second")]
    for model, source in zip(models, variants, strict=False):
        shutil.copytree(source, model)
    plan = SoupPlan.read(tmp_path / "out", [str(model) for model in models])
    assert list(plan.models) == ["first-checkpoint-1-5", "second-checkpoint-1-5"]


def test_models_that_do_not_fit_together_are_refused(
    tmp_path: Path, variants: list[Path], tiny_tied_base: Path
) -> None:
    with pytest.raises(MergetuneError, match="tie_word_embeddings"):
        soup_of(tmp_path / "out", [variants[0], tiny_tied_base])


def test_the_command_line_shows_what_was_tried_and_goes_on(
    tmp_path: Path, training_run: Path, suite_file: Path
) -> None:
    arguments = ["soup", "out", training_run, "--last", 3, "--suite", suite_file, "--run", "measured"]
    arguments += ["--engine", "transformers"]
    done = mergetune(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Greedy soup" in done.stdout
    assert "checkpoint-100" in done.stdout
    assert done.stdout.splitlines()[-1] == "Merged model: out"
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "measured" / "record.json").exists()
    done = mergetune("soup", "both", *sorted(training_run.glob("checkpoint-?*0")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Averaged: checkpoint-10, checkpoint-100" in done.stdout
    assert mergetune("soup", "out", training_run, "--last", 1).returncode == 3


def test_an_ingredient_called_as_a_part_of_a_study_takes_its_folder_into_its_name() -> None:
    assert _names(["m/base", "m/tuned"]) == ["m-base", "m-tuned"]
