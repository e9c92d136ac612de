"""The command at the end of a study."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mergetune.errors import MergetuneError
from mergetune.results.config import read_study
from studies import run, write_study


def test_the_command_gets_the_report_and_the_status(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    script, out = tmp_path / "told.py", tmp_path / "told.json"
    script.write_text(
        "import json, sys, pathlib\n"
        "status = json.load(sys.stdin)\n"
        f"pathlib.Path({str(out)!r}).write_text(json.dumps([sys.argv[1:], status]))\n"
    )
    command = f'{sys.executable} {script} "two words"'
    study = write_study(tmp_path / "study", tiny_base, tiny_experts, on_finish=command, budget={"trials": 1})
    printed = run(study, tmp_path / "run")
    arguments, status = json.loads(out.read_text())
    assert arguments == ["two words", str((tmp_path / "run" / "report" / "index.html").resolve())]
    assert (status["n_trials"], status["is_at_work"]) == (1, False)
    assert "on_finish" not in printed

    # what goes wrong there takes nothing from the study, and another command may be taken when it goes on
    script.write_text("raise SystemExit('no network')")
    assert "`: exit code 1: no network" in run(study, tmp_path / "run")
    write_study(
        tmp_path / "study", tiny_base, tiny_experts, on_finish="no-such-command", budget={"trials": 1}
    )
    assert "No such file or directory: 'no-such-command'" in run(study, tmp_path / "run")


def test_a_quote_that_is_not_closed_is_refused(
    tiny_base: Path, tiny_experts: dict[str, Path], tmp_path: Path
) -> None:
    study = write_study(tmp_path, tiny_base, tiny_experts, on_finish="notify 'me")
    with pytest.raises(MergetuneError, match=r"on_finish.*No closing quotation"):
        read_study(study)
