"""The regression gate in pytest: a test per objective and guard of the suite, which judges its tasks, too.

CANDIDATE=next BASELINE=deployed SUITE=deploy.yaml pytest test_merge.py

Further options of `mergetune check` go into OPTIONS, such as OPTIONS="--engine transformers". Where the items
cannot tell, a test is skipped and the job stays green: `pytest -rs` lists the skips; `mergetune check` itself
exits with 2.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mergetune.evaluation.suite import read_suite
from mergetune.files.library import find

SUITE = os.environ["SUITE"]  # a preset's name or a path
SCORES = read_suite(find("evals", SUITE, Path())).config.scores


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Check the candidate once; exit codes above 2 are errors, and no verdict."""
    models = [os.environ["CANDIDATE"], "--baseline", os.environ["BASELINE"]]
    options = shlex.split(os.environ.get("OPTIONS", ""))
    command = ["mergetune", "check", *models, "--suite", SUITE, *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode <= 2, done.stderr
    return list(json.loads(done.stdout)["rows"])


@pytest.mark.parametrize("score", SCORES)
def test_the_candidate_is_not_worse_than_its_margin(score: str, rows: list[dict[str, Any]]) -> None:
    """Fail where the score or one of its tasks does, as the verdict; skip where the items cannot tell."""
    own, *tasks = (row for row in rows if row["score_name"] == score)
    for row in (own, *tasks):
        assert row["verdict"] != "fail", f"{row['name']}: {row['difference']:+.3f}, {row['margin']} allowed"
    if own["verdict"] == "inconclusive":
        pytest.skip(f"{own['n_items']} items cannot tell; {own['items_to_decide'] or 'no number'} would")
