"""The regression gate in pytest: a test per objective and guard of the suite, which judges its tasks, too.

CANDIDATE=next BASELINE=deployed SUITE=deploy.yaml pytest test_merge.py

ENGINE names an engine, or a YAML file with `engine`. Where the items cannot tell, a test is skipped and the
job stays green: `pytest -rs` lists the skips; `mergetune check` itself exits with 2.
"""

import os
from typing import Any

import pytest

import mergetune

SUITE = os.environ["SUITE"]  # a preset's name or a path


@pytest.fixture(scope="session")
def rows() -> list[Any]:
    """Check the candidate once."""
    options = mergetune.ModelOptions(engine=os.environ.get("ENGINE", "auto"), say=print)
    found = mergetune.check(os.environ["CANDIDATE"], os.environ["BASELINE"], SUITE, options=options)
    return list(found.check.rows)


@pytest.mark.parametrize("score", mergetune.read_suite(SUITE).config.scores)
def test_the_candidate_is_not_worse_than_its_margin(score: str, rows: list[Any]) -> None:
    """Fail where the score or one of its tasks does, as the verdict; skip where the items cannot tell."""
    own, *tasks = (row for row in rows if row.score_name == score)
    for row in (own, *tasks):
        assert row.verdict != "fail", f"{row.name}: {row.difference:+.3f}, {row.margin} allowed"
    if own.verdict == "inconclusive":
        pytest.skip(f"{own.n_items} items cannot tell; {own.items_to_decide or 'no number'} would")
