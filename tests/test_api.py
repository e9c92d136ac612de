"""The public face on tiny real models: what the command line does, as functions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mergetune
from helpers import mergetune as command
from mergetune.weights.checkpoint import Checkpoint
from studies import write_study

OPTIONS = mergetune.ModelOptions(engine="transformers")


def test_importing_it_loads_nothing_heavy() -> None:
    program = (
        "import sys, mergetune\n"
        "assert {'run_study', 'check'} <= set(dir(mergetune))\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'optuna', 'pandas', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mergetune.nothing


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> mergetune.Run:
    folder = tmp_path_factory.mktemp("api")
    study = write_study(folder, tiny_base, tiny_experts, warm_start="none")
    return mergetune.run_study(study, folder / "run")


def test_a_run_is_read(run: mergetune.Run) -> None:
    again = mergetune.read_run(run.path)
    names = [candidate.name for candidate in again.candidates]
    assert names[0] == "base"
    assert {"expert-a", "expert-b", "average-0.5", "trial-0001", "trial-0003"} <= set(names)
    assert again.front.keys() <= set(names)
    assert all(0 <= probability <= 1 for probability in again.front.values())
    assert again.recommended in names
    assert again.recipe("expert-a").groups[0].per_expert("lambda") == {"a": 1.0, "b": 0.0}
    with pytest.raises(mergetune.MergetuneError, match="has no candidate `trial-0009`, but base, "):
        again.recipe("trial-0009")


def test_scores_and_intervals_are_those_of_the_items(run: mergetune.Run) -> None:
    items, scores = run.items("average-0.5"), run.scores("average-0.5", level=0.9)
    assert {"score_name", "task", "item", "split", "prompt", "target", "response", "score"} == set(items)
    assert set(items["split"]) == {"search"}
    draw = np.random.default_rng(1)
    for name, own in items.groupby("score_name"):
        values, found = own["score"].to_numpy(), scores[str(name)]
        assert found.value == pytest.approx(values.mean())
        assert found.n_items == len(values)
        # a plain bootstrap of n − 1 of the n items
        means = [draw.choice(values, len(values) - 1).mean() for _ in range(4000)]
        expected = np.quantile(means, [0.05, 0.95])
        assert [found.interval.lower, found.interval.upper] == pytest.approx(expected, abs=0.05)
    assert run.scores("base", "holdout")["words"].n_items < 16


def test_a_model_is_evaluated_as_by_the_command(run: mergetune.Run, tiny_base: Path, tmp_path: Path) -> None:
    suite = run.path.parent / "suite.yaml"
    found = mergetune.evaluate(tiny_base, suite, split="holdout", options=OPTIONS)
    done = command(
        *("eval", tiny_base, "--suite", suite, "--split", "holdout", "--engine", "transformers"),
        *("--json", "--out", tmp_path / "items.parquet"),
    )
    assert done.returncode == 0, done.stderr
    assert {name: score.value for name, score in found.scores().items()} == {
        name: score["value"] for name, score in json.loads(done.stdout).items()
    }
    pd.testing.assert_frame_equal(found.items, pd.read_parquet(tmp_path / "items.parquet"), check_dtype=False)
    assert mergetune.read_suite(suite).config.scores.keys() == found.scores().keys()


def with_margins(suite: str) -> str:
    for name in ("words", "parity"):
        suite = suite.replace(f"  {name}:\n", f"  {name}:\n    margin: 0.9\n")
    return suite


def test_a_merge_is_made_checked_and_checked_again_from_what_was_measured(
    run: mergetune.Run, tiny_base: Path, tmp_path: Path
) -> None:
    recipe = run.path / "best" / "recipe.yaml"
    made = mergetune.merge(recipe, tmp_path / "merged")
    best = Checkpoint(run.path / "best")
    assert all(torch.equal(Checkpoint(made).tensor(name), best.tensor(name)) for name in best.names)
    suite = tmp_path / "suite.yaml"
    suite.write_text(with_margins((run.path.parent / "suite.yaml").read_text()))
    for name in ("words", "parity"):
        (tmp_path / f"{name}.jsonl").write_text((run.path.parent / f"{name}.jsonl").read_text())
    found = mergetune.check(made, tiny_base, suite, split="all", store=tmp_path / "store", options=OPTIONS)
    assert found.check.verdict in ("pass", "inconclusive", "fail")
    found.candidate.to_parquet(tmp_path / "candidate.parquet")
    found.baseline.to_parquet(tmp_path / "baseline.parquet")
    again = mergetune.check_measurements(
        tmp_path / "candidate.parquet", tmp_path / "baseline.parquet", suite, split="all"
    )
    assert [row.difference for row in again.check.rows] == [row.difference for row in found.check.rows]


def test_models_are_inspected(tiny_base: Path, tiny_experts: dict[str, Path]) -> None:
    found = mergetune.inspect(tiny_base, dict(tiny_experts))
    norms = {name: own.norm for name, own in found.statistics.whole.experts.items()}
    assert norms["b"] == pytest.approx(2 * norms["a"], rel=0.05)
    assert found.sensitivity is None
    with pytest.raises(mergetune.MergetuneError, match="no such model directory"):
        mergetune.inspect(tiny_base, {"gone": "nowhere/at-all/here"})


def test_the_examples_of_the_docs_run(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for function in mergetune.__all__:
        if function[0].islower() and function != "read_suite":
            assert any(f"mergetune.{function}(" in example for example in examples), function
    models = {name: tmp_path / f"expert-{name}" for name in tiny_experts}
    for name, model in tiny_experts.items():
        shutil.copytree(model, models[name])
    shutil.copytree(tiny_base, tmp_path / "base")
    write_study(tmp_path, tmp_path / "base", models, warm_start="none")
    suite = tmp_path / "suite.yaml"
    suite.write_text(with_margins(suite.read_text()))
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    for example in examples:
        exec(example, known)
    assert known["run"].recommended
    assert known["checked"].check.summary == known["again"].check.summary
    assert (known["folder"] / "model.safetensors").exists()
