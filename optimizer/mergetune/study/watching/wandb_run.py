"""A study in Weights & Biases: one run, a step for each candidate."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetune.errors import MergetuneError
from mergetune.results.config import WandbConfig
from mergetune.results.run_dir import RunDir
from mergetune.study.watching.seen import Ended, Seen, study_facts

if TYPE_CHECKING:
    import wandb

_NAME = "mergetune"  # of the project, unless the user has another
_BROKEN_OFF = 255  # the exit code by which W&B shows that a run was interrupted


class WandbRun:
    """A study's run in Weights & Biases.

    A step's number is the candidate's, and the run has the id that the run directory has there, so that a
    study that goes on adds what is missing. Offline every sitting has a folder of its own that holds all
    candidates. At the end there are a table of them, the Pareto chart, the report and the items' scores.

    Args:
        config: where.
        run: the run directory.

    Raises:
        MergetuneError: W&B is not installed.
    """

    name, secret = "loggers: wandb", ""

    def __init__(self, config: WandbConfig, run: RunDir) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise MergetuneError("`loggers: wandb` needs W&B. Install it: pip install '.[wandb]'")
        self._config, self._run = config, run
        self._live: wandb.Run | None = None
        self._last_step = 0
        self._rows: dict[str, dict[str, Any]] = {}  # of the table, by the candidate's name

    def connect(self, keys: Collection[str]) -> Collection[str]:  # noqa: ARG002
        """Begin the run or go on with it; which steps it has `show` knows.

        Raises:
            MergetuneError: nobody is logged in.
        """
        import wandb

        if self._live is None:
            settings = wandb.setup().settings
            if settings.mode == "online" and not wandb.login(prompt=False, verify=False):
                raise MergetuneError(
                    "`loggers: wandb` needs to be logged in: `wandb login`, or set WANDB_API_KEY; "
                    "WANDB_MODE=offline keeps all on disk, and `wandb sync` uploads it later."
                )
            name = self._run.watched_as()
            self._live = wandb.init(
                project=self._config.project or settings.project or _NAME,
                entity=self._config.entity,
                id=name,
                name=name,
                resume="allow",
                reinit="create_new",
                dir=self._run.path,
                config=study_facts(self._run),
                settings=wandb.Settings(console="off", silent=True),
            )
            self._live.define_metric("*", step_metric="number")
        return ()

    def show(self, seen: Seen) -> None:
        """Log a candidate as a step, unless the run has it."""
        own = seen.candidate
        params = {f"params.{name}": value for name, value in (own.params or {}).items()}
        row = _slashed({"number": own.number, **seen.facts(), **params, **seen.figures()})
        self._rows[own.name] = row
        self._last_step = own.number
        if own.number >= self._open.starting_step:
            self._open.log(row, step=own.number)

    def finish(self, ended: Ended) -> None:
        """Log the table, the chart, the report and the items' scores; say what is recommended."""
        import wandb

        front, chosen = ended.run.front, ended.run.recommended
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        data = [
            [*(row.get(name) for name in columns), front.get(candidate), candidate == chosen]
            for candidate, row in self._rows.items()
        ]
        last: dict[str, Any] = {"candidates": wandb.Table([*columns, "front", "recommended"], data)}
        if (chart := ended.report.with_name("pareto.png")).is_file():
            last["pareto"] = wandb.Image(str(chart))
        self._open.log(last, step=self._last_step)  # one more step would be taken for a candidate's
        self._open.summary.update({"recommended": chosen, "front": list(front)})
        if chosen is not None:
            self._open.summary.update(_slashed(ended.figures(chosen)))
        report = wandb.Artifact(f"{self._run.watched_as()}-report", "report")
        folder = ended.report.parent
        for file in filter(Path.is_file, sorted(folder.rglob("*"))):
            report.add_file(str(file), str(file.relative_to(folder)))
        items = wandb.Artifact(f"{self._run.watched_as()}-items", "items")
        for name in self._rows:
            if (measured := self._run.measurement_file(name)) is not None:
                items.add_file(str(measured))
        for artifact in (report, items):
            self._open.log_artifact(artifact)
        self._open.finish()
        self._live = None

    def close(self) -> None:
        """Say that a study was broken off, where it has not come to its end."""
        if self._live is not None:
            self._live.finish(exit_code=_BROKEN_OFF)

    @property
    def _open(self) -> wandb.Run:
        assert self._live is not None  # connected before
        return self._live


def _slashed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose names have `/`, by which W&B groups them, for `.`, which it takes as nested."""
    return {name.replace(".", "/"): value for name, value in row.items()}
