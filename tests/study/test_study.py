"""Whole studies on tiny real models: measured, resumed, interrupted, killed."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import fine_tune
from judged import silent_on, write_judged_suite
from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.measuring.model_under_test import open_model
from mergetune.measuring.pool import Job, Pool
from mergetune.measuring.reply_store import default_store
from mergetune.results import selection
from mergetune.results.run_dir import RunDir
from mergetune.space.recipe import MergeRecipe
from mergetune.study.dry_run import describe_study
from mergetune.study.export import merge_recipe
from mergetune.weights.checkpoint import Checkpoint
from plain_server import plain_server
from report_pages import packs_of, unpacked
from studies import run, write_study


def measure_again(model: Path, run: RunDir) -> pd.DataFrame:
    """Score a model directory on the search split of a run's suite."""
    evaluator = Evaluator(read_suite(Path(run.study.suite)))
    config = EngineConfig(kind="transformers")
    with closing(Pool(open_model(str(model)), config, evaluator, None)) as pool:
        return pool.measured(Job("test", evaluator.documents("search"))).measurement.items


def in_process(study: Path, out: Path) -> subprocess.Popen[str]:
    """Start `mergetune run` in a process of its own."""
    command = [sys.executable, "-m", "mergetune.cli", "run", str(study), "--out", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # even where tests run under nohup
    )


def wait_for(path: Path, process: subprocess.Popen[str], timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline, f"{path} did not appear in {timeout_s} s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def models(tiny_base: Path, tiny_experts: dict[str, Path], tiny_adapter: Path) -> dict[str, Path]:
    return {"base": tiny_base, "a": tiny_experts["a"], "lora": tiny_adapter}


def study_of(folder: Path, models: dict[str, Path], **changes: Any) -> Path:
    experts = {name: path for name, path in models.items() if name != "base"}
    return write_study(folder, models["base"], experts, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> RunDir:
    folder = tmp_path_factory.mktemp("finished")
    run(study_of(folder, models), folder / "run")
    return RunDir(folder / "run")


def test_what_was_tuned_is_checked_without_asking_again(finished: RunDir) -> None:
    suite = read_suite(Path(finished.study.suite))
    evaluator, best = Evaluator(suite), open_model(str(finished.path / "best"), chat=True)
    config = EngineConfig(kind="transformers")
    with closing(Pool(best, config, evaluator, default_store())) as pool:
        again = pool.measured(Job("check", evaluator.documents("search")))
        assert again.n_asked == 0
        assert pool.engine is None
    choice = selection.choose(finished)
    assert choice is not None
    assert choice.recommendation is not None
    kept = finished.scores(choice.recommendation.name, "search")
    assert again.measurement.scores() == kept


def test_what_was_sent_is_kept_of_every_item(finished: RunDir) -> None:
    sent = finished.sent()
    assert sent is not None
    assert set(sent["item"]) == set(finished.items()["item"])
    lm = open_model(str(finished.path / "best"), chat=True).prompts()  # type: ignore[union-attr]
    texts = sent[sent["score_name"] == "words"]["sent"].tolist()
    asked = [lm.apply_chat_template([{"role": "user", "content": f"Say {i}."}]) for i in range(16)]
    assert sorted(texts) == sorted(asked)
    packs = packs_of(finished.path / "report" / "index.html")
    shown = [text for score, *_, text in unpacked(packs["items.search"]) if score == "words"]
    assert sorted(shown) == sorted(set(asked) & set(shown))
    assert shown


def test_baselines_come_first_and_trials_follow(finished: RunDir) -> None:
    names = [candidate.name for candidate in finished.candidates()]
    assert names[:4] == ["base", "expert-a", "expert-lora", "average-0.5"]
    assert names[-3:] == ["trial-0001", "trial-0002", "trial-0003"]
    for name in names:
        scores = finished.scores(name, "search")
        assert scores is not None
        assert set(scores) == {"words", "parity", "calm"}


def test_the_norm_equalized_average_gives_each_task_vector_the_same_length(finished: RunDir) -> None:
    found = finished.candidate("average-equalized")
    assert found is not None
    lambdas = found.recipe.groups[0].per_expert("lambda")
    model = finished.read_json("model.json")
    assert set(model["changed"]["lora"]) < set(model["tensors"])
    norms = model["task_vector_norms"]
    first, second = (lambdas[name] * norms[name] for name in lambdas)
    assert first == pytest.approx(second)
    assert sum(lambdas.values()) == pytest.approx(1)
    assert found.params is not None  # it teaches the sampler


def test_the_run_directory_says_how_the_numbers_came_about(finished: RunDir) -> None:
    assert finished.study.digests.keys() == {"suite", "rules", "search_space", "base", "a", "lora"}
    assert finished.read_json("versions.json")["torch"] == importlib.metadata.version("torch")
    assert "trial" in (finished.path / "run.log").read_text() or (finished.path / "run.log").exists()
    cost = finished.candidates()[-1].cost
    assert min(cost.merge_s, cost.load_s, cost.evaluate_s) > 0


def test_the_merged_model_is_the_one_that_was_scored(finished: RunDir, models: dict[str, Path]) -> None:
    best = finished.path / "best"
    recipe = MergeRecipe.read(best / "recipe.yaml")
    scored = next(found for found in finished.candidates() if found.recipe.digest == recipe.digest)
    again = measure_again(best, finished)
    measured = finished.measurement(scored.name, "search")
    assert measured is not None
    assert again.equals(measured)


def test_the_merged_model_is_an_ordinary_model_directory(finished: RunDir) -> None:
    best = finished.path / "best"
    model: Any = AutoModelForCausalLM.from_pretrained(best)
    tokenizer: Any = AutoTokenizer.from_pretrained(best)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert "digest" in (best / "README.md").read_text().lower()


def test_a_recipe_of_the_report_gives_the_same_bits(finished: RunDir, tmp_path: Path) -> None:
    best = Checkpoint(finished.path / "best")
    merge_recipe(finished.path / "best" / "recipe.yaml", tmp_path / "again")
    assert Checkpoint(tmp_path / "again").digest == best.digest


def test_a_recipe_whose_inputs_changed_is_refused(finished: RunDir, tmp_path: Path) -> None:
    text = (finished.path / "best" / "recipe.yaml").read_text()
    digest = finished.study.digests["a"]
    (tmp_path / "recipe.yaml").write_text(text.replace(digest, "f" * 64))
    with pytest.raises(MergetuneError, match=r"the weights of `a` .* are not those"):
        merge_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_search_split_and_the_holdout_share_no_item(finished: RunDir) -> None:
    search, holdout = (finished.measurement("base", split) for split in ("search", "holdout"))
    assert search is not None
    assert holdout is not None
    assert not set(search["item"]) & set(holdout["item"])


def test_the_noise_floor_is_measured(finished: RunDir) -> None:
    first, again = finished.measurement("base", "search"), finished.noise()
    assert first is not None
    assert again is not None
    assert again.equals(first)  # transformers decodes greedily, in the same batches


def test_the_finalists_are_written_down_before_the_holdout_is_used(finished: RunDir) -> None:
    (use,) = finished.holdout_uses()
    assert use.n_candidates == len(finished.all_scores("search"))
    assert {*use.finalists, "base", "expert-a"} <= finished.all_scores("holdout").keys()
    first_look = min(file.stat().st_mtime for file in finished.path.glob("candidates/*.holdout.parquet"))
    assert (finished.path / "holdout.json").stat().st_mtime <= first_look


def test_the_best_average_is_confirmed_as_well_as_the_plain_one(finished: RunDir) -> None:
    baselines = {candidate.name for candidate in finished.candidates() if candidate.is_baseline}
    search = {name: own for name, own in finished.all_scores("search").items() if name in baselines}
    scales = selection.scales_of(finished, search)
    best = selection.recommend(search, finished.study.suite_config, scales)
    assert best is not None
    assert best.name != "average-0.5"
    assert {best.name, "average-0.5"} <= finished.all_scores("holdout").keys()


def test_a_second_use_of_the_holdout_is_written_down(finished: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished.path, out)
    (use,) = finished.holdout_uses()
    other = use.model_copy(update={"finalists": ("another",)})
    RunDir(out).write_json("holdout.json", [other.model_dump(mode="json")])
    printed = run(out / "study.yaml", out)
    assert "the holdout split is used again (use 2)" in printed
    assert [each.finalists for each in RunDir(out).holdout_uses()] == [("another",), use.finalists]


def test_running_again_measures_nothing_again(finished: RunDir, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished.path, copy)
    before = {file.name: file.stat().st_mtime_ns for file in (copy / "candidates").iterdir()}
    run(finished.path / "study.yaml", copy)  # the resolved study file is the same study
    assert {file.name: file.stat().st_mtime_ns for file in (copy / "candidates").iterdir()} == before


def test_the_budget_may_grow(finished: RunDir, models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished.path, copy)
    folder = finished.path.parent
    longer = yaml.safe_load((folder / "study.yaml").read_text()) | {"budget": {"trials": 4}}
    (folder / "longer.yaml").write_text(yaml.safe_dump(longer))
    printed = run(folder / "longer.yaml", copy)
    assert "trial-0004" in printed
    assert "trial-0003  " not in printed


def test_another_study_in_the_same_directory_is_refused_with_the_difference(finished: RunDir) -> None:
    folder = finished.path.parent
    other = yaml.safe_load((folder / "study.yaml").read_text()) | {"seed": 7}
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(MergetuneError, match="seed: was 0, is 7"):
        run(folder / "other.yaml", finished.path)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, models: dict[str, Path]) -> None:
    study = study_of(tmp_path, models)
    with pytest.raises(MergetuneError, match="holds other files"):
        run(study, tmp_path)


def test_kill_9_loses_nothing_and_the_study_goes_on(tmp_path: Path, models: dict[str, Path]) -> None:
    study, out = study_of(tmp_path, models, budget={"trials": 6}), tmp_path / "run"
    process = in_process(study, out)
    wait_for(out / "candidates" / "trial-0002.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {file.name: file.read_bytes() for file in (out / "candidates").glob("*.search.parquet")}
    assert len(kept) >= 8
    printed = run(study, out)
    found = RunDir(out)
    assert [c.name for c in found.candidates() if not c.is_baseline] == [f"trial-000{i}" for i in range(1, 7)]
    for name, content in kept.items():
        assert (out / "candidates" / name).read_bytes() == content
    assert "trial-0001  " not in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_its_like_end_with_a_report_and_the_study_goes_on(
    number: signal.Signals, tmp_path: Path, models: dict[str, Path]
) -> None:
    study, out = study_of(tmp_path, models, budget={"trials": 500}), tmp_path / "run"
    process = in_process(study, out)
    wait_for(out / "candidates" / "trial-0001.json", process)
    with pytest.raises(MergetuneError, match="another `mergetune run` is at work"):
        run(study, out)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Interrupted" in printed
    assert "Traceback" not in printed
    assert (out / "report" / "index.html").exists()
    n_kept = sum(not found.is_baseline for found in RunDir(out).candidates())
    printed = run(study_of(tmp_path, models, budget={"trials": n_kept + 1}), out)
    assert f"trial-{n_kept + 1:04d}" in printed


def test_what_a_killed_run_left_half_written_is_swept_and_broken_files_are_measured_again(
    finished: RunDir, tmp_path: Path
) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(finished.path, copy.path)
    (copy.path / ".best.abc").mkdir()
    (copy.path / ".best.abc" / "config.json").write_text("{}")
    for name in ("record.json.77.tmp", "candidates/trial-0001.json.77.tmp", "attempts/x.json.77.tmp"):
        (copy.path / name).write_text("half")
    candidates = copy.path / "candidates"
    (candidates / "trial-0001.json").write_bytes(b"")
    (candidates / "trial-0002.search.parquet").write_bytes(b"")
    (candidates / "base.json").write_bytes(b"")
    before = {name: finished.scores(name, "search") for name in ("base", "trial-0001", "trial-0002")}
    params = {c.name: c.params for c in finished.candidates()}
    printed = run(finished.path / "study.yaml", copy.path)
    for name in ("trial-0001.json", "trial-0002.search.parquet", "base.json"):
        assert f"{name} cannot be read" in printed
        assert (candidates / f"{name}.broken").exists()
    assert not [path for path in copy.path.rglob("*") if path.suffix == ".tmp" or path.name[:6] == ".best."]
    for name in ("base", "trial-0002"):
        assert copy.scores(name, "search") == before[name]
    again = [c for c in copy.candidates() if c.params == params["trial-0001"]]
    assert [copy.scores(c.name, "search") for c in again] == [before["trial-0001"]]


def test_the_budget_of_hours_ends_the_search(tmp_path: Path, models: dict[str, Path]) -> None:
    study = study_of(
        tmp_path, models, budget={"trials": 1000, "hours": 0.0006, "patience": 1000}, sampler="RandomSampler"
    )
    printed = run(study, tmp_path / "run")
    assert "The search ended when the budget of 0.0006 hours was spent." in printed
    assert (tmp_path / "run" / "best").is_dir()
    before = RunDir(tmp_path / "run").candidates()
    assert "The search ended when the budget of 0.0006 hours was spent." in run(study, tmp_path / "run")
    assert RunDir(tmp_path / "run").candidates() == before
    assert len(RunDir(tmp_path / "run").holdout_uses()) == 1


def test_the_search_ends_when_its_items_are_spent_or_its_target_is_reached(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    study = study_of(tmp_path, models, budget={"trials": 9, "items": 190})  # 23 for each of 7 baselines
    assert "The search ended when 207 items were measured, of 190 in the budget." in run(
        study, tmp_path / "a"
    )
    study = study_of(tmp_path, models, budget={"trials": 9, "items": 150}, warm_start="gradient")
    printed = run(study, tmp_path / "spent")
    assert "The search ended when 161 items were measured, of 150 in the budget." in printed
    assert "gradient-1" not in printed  # nor are slopes followed
    study = study_of(tmp_path, models, budget={"trials": 30, "patience": 3})
    printed = run(study, tmp_path / "patient")
    assert "The search ended when 3 candidates in a row had brought no better merge." in printed
    found = RunDir(tmp_path / "patient")
    best = selection.recommend(
        found.all_scores("search"),
        found.study.suite_config,
        selection.scales_of(found, found.all_scores("search")),
    )
    assert best is not None
    searched = [each.name for each in found.candidates() if not each.is_baseline]
    n_until = searched.index(best.name) + 1 if best.name in searched else 0
    assert len(searched) == n_until + 3
    reached = {"trials": 9, "target": {"words": 0.0}}
    study = study_of(tmp_path, models, budget=reached)
    assert "The search ended when `average-0.5` reached the target." in run(study, tmp_path / "b")
    study = study_of(tmp_path, models, budget={"target": {"calm": 0.0}})
    with pytest.raises(MergetuneError, match="must name objectives of the suite, parity, words, but got"):
        run(study, tmp_path / "c")


def test_a_point_without_a_recipe_is_not_asked_for_again(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    space = {"description": "test", "method": "linear", "lambda": {"low": 0, "high": 1}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space | {"groups": [{"name": "all"}]}))
    grid = {"lambda.all.a": [0.0], "lambda.all.b": [0.0]}
    study = write_study(
        tmp_path / "study",
        tiny_base,
        tiny_experts,
        search_space=str(tmp_path / "space.yaml"),
        sampler={"kind": "GridSampler", "search_space": grid},
    )
    printed = run(study, tmp_path / "run")
    assert "trial-0001 failed: " in printed
    assert "The search ended when the sampler had proposed every point that there is." in printed
    budget = yaml.safe_load(study.read_text()) | {"budget": {"trials": 1}}
    study.write_text(yaml.safe_dump(budget))
    assert "trial-0001" not in run(study, tmp_path / "run")


@pytest.mark.parametrize("sampler", ["auto", "RandomSampler", "TPESampler"])
def test_no_recipe_is_measured_twice_and_a_search_without_others_ends(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], sampler: str
) -> None:
    reach = {"low": 0.0, "high": 1.5, "step": 0.5}
    space = {"description": "test", "method": "task_arithmetic", "lambda": reach, "groups": [{"name": "all"}]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    changes = {"search_space": str(tmp_path / "space.yaml"), "budget": {"trials": 12}, "sampler": sampler}
    study = write_study(tmp_path / "study", tiny_base, {"a": tiny_experts["a"]}, **changes)
    printed = run(study, tmp_path / "run")
    assert printed.count("The search ended when all that the sampler proposed was measured before.") == 1
    candidates = RunDir(tmp_path / "run").candidates()
    assert {found.params["lambda.all.a"] for found in candidates if found.params} == {0, 0.5, 1, 1.5}
    trials = [found for found in candidates if not found.is_baseline]
    assert len(trials) == 1  # the others are baselines
    assert "trial-0002" not in run(study, tmp_path / "run")


def test_a_search_whose_scores_do_not_depend_on_the_coefficients_ends(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = write_study(tmp_path / "study", tiny_base, {"a": tiny_base}, budget={"trials": 30})
    assert "no score was seen to depend on the coefficients" in run(study, tmp_path / "run")
    trials = [found for found in RunDir(tmp_path / "run").candidates() if not found.is_baseline]
    assert len(trials) < 12


def test_with_nothing_to_search_no_trial_is_measured_where_none_is_allowed(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    space = {"description": "test", "method": "linear", "lambda": 1.0, "groups": [{"name": "all"}]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    changes = {"search_space": str(tmp_path / "space.yaml"), "budget": {"trials": 0}}
    study = write_study(tmp_path / "study", tiny_base, {"a": tiny_experts["a"]}, **changes)
    assert "trial-" not in run(study, tmp_path / "run")


def test_a_sampler_that_cannot_search_the_study_is_refused_before_any_work(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    study = study_of(tmp_path, models, sampler="CmaEsSampler")
    with pytest.raises(MergetuneError, match="CmaEsSampler cannot search this study"):
        run(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_candidate_that_cannot_be_measured_fails_and_the_search_goes_on(
    tmp_path: Path, models: dict[str, Path], tiny_half: dict[str, Path]
) -> None:
    space = tmp_path / "space.yaml"
    reach = {"low": 0.0, "high": 1e9}  # far beyond what float16 holds
    space.write_text(
        yaml.safe_dump(
            {"description": "test", "method": "task_arithmetic", "lambda": reach, "groups": [{"name": "all"}]}
        )
    )
    study = write_study(
        tmp_path / "study",
        tiny_half["base"],
        {"a": tiny_half["a"]},
        search_space=str(space),
        sampler="RandomSampler",
    )
    printed = run(study, tmp_path / "run")
    failed = [found for found in RunDir(tmp_path / "run").candidates() if found.state == "failed"]
    assert len(failed) == 3
    assert all("infinite or NaN" in (found.reason or "") for found in failed)
    assert "failed: " in printed


@pytest.mark.parametrize("space", ["ties_layer_groups", "dare_ties_layer_groups", "slerp_layer_groups"])
def test_every_method_runs_a_study(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], space: str
) -> None:
    study = write_study(tmp_path, tiny_base, tiny_experts, search_space=space, budget={"trials": 2})
    run(study, tmp_path / "run")
    found = RunDir(tmp_path / "run")
    method = space.removesuffix("_layer_groups")
    assert {c.recipe.method for c in found.candidates() if not c.is_baseline} == {method}


def test_tied_embeddings_are_scored_as_they_are_written(tmp_path: Path, tiny_tied_base: Path) -> None:
    expert = fine_tune(tiny_tied_base, tmp_path / "expert", seed=1, std=0.02)
    study = write_study(tmp_path / "study", tiny_tied_base, {"only": expert}, budget={"trials": 1})
    run(study, tmp_path / "run")
    found = RunDir(tmp_path / "run")
    recipe = MergeRecipe.read(found.path / "best" / "recipe.yaml")
    scored = next(c for c in found.candidates() if c.recipe.digest == recipe.digest)
    again = measure_again(found.path / "best", found)
    measured = found.measurement(scored.name, "search")
    assert measured is not None
    assert again.equals(measured)


_POISON = """
import os, signal
from pathlib import Path


def process_results(doc, results):
    if Path({marker!r}).exists():
        {effect}
    return {{"acc": float(len(results[0]) % 2)}}
"""


def poisoned_study(folder: Path, models: dict[str, Path], name: str, effect: str) -> Path:
    """Write a study with a task whose own code does something while one candidate is measured."""
    study = study_of(folder, models, budget={"trials": 4})
    (folder / "poison.jsonl").write_text("\n".join(json.dumps({"prompt": f"Tell {i}."}) for i in range(12)))
    marker = str(folder / "run" / "attempts" / f"{name}.json")
    (folder / "poison.py").write_text(_POISON.format(marker=marker, effect=effect))
    (folder / "poison.yaml").write_text(
        f"""task: poison
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "poison.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: ""
process_results: !function poison.process_results
generation_kwargs: {{max_gen_toks: 4, until: []}}
metric_list: [{{metric: acc}}]
"""
    )
    suite = yaml.safe_load((folder / "suite.yaml").read_text())
    suite["include_path"] = "."
    suite["objectives"]["own"] = {"tasks": [{"lm_eval": "poison"}]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return study


def run_until_killed(study: Path, out: Path, times: int) -> None:
    """Run a study that kills its process, so often."""
    for _ in range(times):
        process = in_process(study, out)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL


def test_a_task_whose_own_code_fails_on_one_candidate_fails_that_one_alone(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    study = poisoned_study(tmp_path, models, "search.trial-0002", 'raise KeyError("boom")')
    run(study, tmp_path / "run")
    found = {each.name: each for each in RunDir(tmp_path / "run").candidates() if not each.is_baseline}
    assert [each.state for each in found.values()] == ["complete", "failed", "complete", "complete"]
    assert found["trial-0002"].reason == "KeyError: 'boom'"
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text()


def test_a_trial_that_kills_the_process_twice_is_given_up_and_the_study_goes_on(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    study, out = poisoned_study(tmp_path, models, "search.trial-0002", kill), tmp_path / "run"
    run_until_killed(study, out, times=2)
    process = in_process(study, out)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    found = {each.name: each for each in RunDir(out).candidates() if not each.is_baseline}
    assert [each.state for each in found.values()] == ["complete", "failed", "complete", "complete"]
    assert "twice the process ended in the middle of it" in (found["trial-0002"].reason or "")


def test_a_baseline_that_kills_the_process_twice_is_an_error_that_names_it(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    study, out = poisoned_study(tmp_path, models, "search.expert-a", kill), tmp_path / "run"
    run_until_killed(study, out, times=2)
    with pytest.raises(MergetuneError, match=r"baseline `expert-a` cannot be measured: begun 2 times"):
        run(study, out)


def test_a_judge_without_a_verdict_on_one_item_does_not_end_the_night(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGETUNE_CACHE", str(tmp_path / "cache"))
    study, folder = study_of(tmp_path / "study", models), tmp_path / "study"
    suite: dict[str, Any] = {"n_items": 60, "holdout": 0.4}
    items = Evaluator(read_suite(write_judged_suite(folder, "http://127.0.0.1:1", **suite))).items()
    silent = items.drop_duplicates("split")["prompt"]
    assert len(silent) == 2, "one in each split, as many as may be"
    with plain_server(silent_on(*silent)) as url:
        write_judged_suite(folder, url, **suite)
        said = " ".join(run(study, tmp_path / "run").split())
    found = RunDir(tmp_path / "run")
    for candidate in found.candidates():
        frame = found.measurement(candidate.name, "search")
        assert candidate.state == "complete"
        assert frame is not None
        assert frame["score"].isna().sum() == 1
        what = f"search.{candidate.name}: `tone:items.jsonl`"
        assert f"warning: {what}: the judge gave no verdict on 1 reply" in said
    n_measured = len(list((found.path / "candidates").glob("*.parquet")))
    page = (found.path / "report" / "index.html").read_text()
    assert f"the judge gave no verdict on {n_measured} replies" in page
    assert "of <code>base</code> to &#39;Question" in page
    assert (found.path / "best" / "model.safetensors").is_file()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    study = study_of(tmp_path, models, budget={"trials": 7, "hours": 2}, warm_start="auto")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    printed = io.StringIO()
    describe_study(study, Console(file=printed, width=200))
    rows = dict(line.split(maxsplit=1) for line in printed.getvalue().splitlines() if line)
    assert "task_arithmetic: 2 coefficients in 1 layer groups" in printed.getvalue()
    assert rows["baselines"].startswith("7 models, and the base twice: ")
    assert "up to 7 trials, within 2 hours: " in rows["trials"]
    assert rows["trials"].endswith("; what slopes lead to costs up to twice as much")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
