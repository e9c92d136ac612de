"""The public face on tiny real models: what the command line does, as functions."""

from __future__ import annotations

import contextlib
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
        "assert not heavy, heavy\n"
        "import mergetune.report\n"
        "heavy = {'torch', 'transformers', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, f'a report needs no {heavy}'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mergetune.nothing


PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


TOOL_ITEM = {
    "prompt": "Weather in Oslo?",
    "tools": [{"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}],
    "answer": [{"name": "weather", "arguments": {"city": "Oslo"}}],
}

MERGEKIT = """
models: [{model: expert-a, parameters: {weight: 0.5}}, {model: expert-b, parameters: {weight: 0.5}}]
merge_method: ties
base_model: base
dtype: bfloat16
"""


def with_margins(suite: str) -> str:
    for name in ("words", "parity"):
        suite = suite.replace(f"  {name}:\n", f"  {name}:\n    margin: 0.9\n")
    return suite


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_experts: dict[str, Path]
) -> dict[str, Any]:
    """Run the examples of the docs, each going on where the one before ended; returns their variables."""
    folder = tmp_path_factory.mktemp("api")
    models = {name: folder / f"expert-{name}" for name in tiny_experts}
    for name, model in tiny_experts.items():
        shutil.copytree(model, models[name])
    shutil.copytree(tiny_base, folder / "base")
    write_study(folder, folder / "base", models, warm_start="none")
    (folder / "tools.jsonl").write_text(json.dumps(TOOL_ITEM))
    (folder / "mergekit.yml").write_text(MERGEKIT)
    suite = folder / "suite.yaml"
    suite.write_text(with_margins(suite.read_text()))
    known: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for example in EXAMPLES:
            exec(example, known)
    return known | {"folder": folder}


@pytest.fixture
def run(found: dict[str, Any]) -> mergetune.Run:
    return mergetune.read_run(found["folder"] / "runs" / "mine")


def test_the_examples_of_the_docs_run(found: dict[str, Any]) -> None:
    for function in mergetune.__all__:
        if function[0].islower() and function != "read_suite":
            assert any(f"mergetune.{function}(" in example for example in EXAMPLES), function
    assert found["run"].recommended
    assert found["joint"].summary == "1 calls and 1 replies; 1 results are made of the call"
    assert found["checked"].check.summary == found["again"].check.summary
    merged, best = (Checkpoint(found["folder"] / name) for name in ("merged", "runs/mine/best"))
    assert all(torch.equal(merged.tensor(name), best.tensor(name)) for name in best.names)


def test_a_run_is_read(run: mergetune.Run) -> None:
    names = [candidate.name for candidate in run.candidates]
    assert names[0] == "base"
    assert {"expert-a", "expert-b", "average-0.5", "trial-0001", "trial-0003"} <= set(names)
    assert run.front.keys() <= set(names)
    assert all(0 <= probability <= 1 for probability in run.front.values())
    assert run.recommended in names
    assert run.recipe("expert-a").groups[0].per_expert("lambda") == {"a": 1.0, "b": 0.0}
    with pytest.raises(mergetune.MergetuneError, match="has no candidate `trial-0009`, but base, "):
        run.recipe("trial-0009")


def test_scores_and_intervals_are_those_of_the_items(run: mergetune.Run) -> None:
    items, scores = run.items("average-0.5"), run.scores("average-0.5", level=0.9)
    assert {"score_name", "task", "item", "split", "prompt", "target", "response", "score", "reason"} == set(
        items
    ) - {
        "system",
        "earlier",
    }
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
    suite = run.path.parents[1] / "suite.yaml"
    found = mergetune.evaluate(tiny_base, suite, split="holdout", options=OPTIONS)
    done = command(
        *("eval", tiny_base, "--suite", suite, "--split", "holdout", "--engine", "transformers"),
        *("--json", "--out", tmp_path / "items.parquet", "--cache", tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert {name: score.value for name, score in found.scores().items()} == {
        name: score["value"] for name, score in json.loads(done.stdout).items()
    }
    pd.testing.assert_frame_equal(found.items, pd.read_parquet(tmp_path / "items.parquet"), check_dtype=False)
    assert mergetune.read_suite(suite).config.scores.keys() == found.scores().keys()


def test_models_are_inspected(tiny_base: Path, tiny_experts: dict[str, Path]) -> None:
    found = mergetune.inspect(tiny_base, dict(tiny_experts))
    norms = {name: own.norm for name, own in found.statistics.whole.experts.items()}
    assert norms["b"] == pytest.approx(2 * norms["a"], rel=0.05)
    assert found.sensitivity is None
    with pytest.raises(mergetune.MergetuneError, match="no such model directory"):
        mergetune.inspect(tiny_base, {"gone": "nowhere/at-all/here"})
