"""The benchmark of a study's own bookkeeping runs, on a run of a few candidates."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "bookkeeping.py"


def test_every_stage_is_timed_in_a_process_of_its_own() -> None:
    sizes = ["--candidates", "14", "--items", "20", "--objectives", "3", "--dimensions", "6"]
    done = subprocess.run([sys.executable, BENCHMARK, *sizes], capture_output=True, text=True, check=True)
    for stage in ("front", "trial", "choose", "smooth", "gather", "report"):
        assert f"{stage}, s" in done.stdout
        assert re.search(rf"{stage} \d+", done.stdout)  # its peak, MB
