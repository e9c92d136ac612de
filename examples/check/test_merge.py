"""The regression gate in pytest: a test per objective and guard of the suite.

CANDIDATE=next BASELINE=deployed SUITE=deploy.yaml pytest test_merge.py
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

SUITE = Path(os.environ["SUITE"])
CONFIG = yaml.safe_load(SUITE.read_text(encoding="utf-8"))
SCORES = [*CONFIG["objectives"], *CONFIG.get("guards", {})]


@pytest.fixture(scope="session")
def rows() -> dict[str, dict[str, Any]]:
    """Check the candidate once; exit codes above 2 are errors, and no verdict."""
    models = [os.environ["CANDIDATE"], "--baseline", os.environ["BASELINE"]]
    command = ["mergetune", "check", *models, "--suite", str(SUITE), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode <= 2, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.mark.parametrize("score", SCORES)
def test_the_candidate_is_not_worse_than_its_margin(score: str, rows: dict[str, dict[str, Any]]) -> None:
    """Skip where the items cannot tell."""
    row = rows[score]
    if row["verdict"] == "inconclusive":
        pytest.skip(f"{row['n_items']} items cannot tell; about {row['items_to_decide']} would")
    assert row["verdict"] == "pass", f"{row['difference']:+.3f}, {row['margin']} allowed"
