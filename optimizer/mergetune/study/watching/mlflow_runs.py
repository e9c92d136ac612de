"""A study in MLflow: a parent run, and a child run for each candidate."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergetune.errors import MergetuneError
from mergetune.files.secret_url import filled
from mergetune.files.yaml_io import to_yaml
from mergetune.results.config import MlflowConfig
from mergetune.results.run_dir import RunDir
from mergetune.study.watching.seen import Ended, Seen, key, study_facts

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NAME = "mergetune"  # of the experiment, unless the user has another
_PARENT = "mlflow.parentRunId"  # the tag by which MLflow shows runs as children of another
_STUDY = "mergetune.study"  # the tag of a study's parent run: the name of the run directory
_STATUS = {"complete": "FINISHED", "dropped": "KILLED", "failed": "FAILED"}
_N_RETRIES = "2"  # of a request, instead of minutes: it is tried again at the next candidate
_MOST_AT_ONCE, _MOST_CHARACTERS = 100, 5000  # that every server takes


class MlflowRuns:
    """A study's runs in MLflow.

    A child run has the candidate's point as parameters, its scores as metrics, its recipe and the scores of
    its items as artifacts. The parent has the report and, at the end, the recommended merge's scores.

    Args:
        config: where.
        run: the run directory.

    Raises:
        MergetuneError: MLflow is not installed.
    """

    name = "loggers: mlflow"

    def __init__(self, config: MlflowConfig, run: RunDir) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise MergetuneError("`loggers: mlflow` needs MLflow. Install it: pip install '.[mlflow]'")
        self._config, self._run = config, run
        self.secret = filled(config.tracking_uri or "", "loggers.tracking_uri")
        self._client: MlflowClient | None = None
        self._experiment = self._parent = ""
        self._children: dict[str, str] = {}  # runs by the candidate's name
        self._has_ended = False

    def connect(self, keys: Collection[str]) -> Collection[str]:
        """Find the study's runs, or begin; returns the keys of the candidates there.

        Runs that were not written to their end, or are of a candidate that is no longer so, are deleted.

        Args:
            keys: of the candidates in the run directory.
        """
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _N_RETRIES)
        client = self._client = MlflowClient(self.secret or None)
        name = self._config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or _NAME
        found = client.get_experiment_by_name(name)
        self._experiment = client.create_experiment(name) if found is None else found.experiment_id
        known = next(self._search(f"tags.`{_STUDY}` = '{self._run.watched_as()}'"), None)
        self._parent = self._begin() if known is None else known.info.run_id
        client.update_run(self._parent, status="RUNNING")
        self._children, held = {}, set()
        for child in self._search(f"tags.`{_PARENT}` = '{self._parent}'"):
            own = key(child.data.tags["candidate"], child.data.tags["recipe"])
            if own in keys and child.info.status in _STATUS.values():
                held.add(own)
                self._children[child.data.tags["candidate"]] = child.info.run_id
            else:
                client.delete_run(child.info.run_id)
        return held

    def show(self, seen: Seen) -> None:
        """Add a candidate as a child run; one that is cut off is known by its status."""
        own, now_ms = seen.candidate, int(time.time() * 1000)
        tags = {_PARENT: self._parent, **_clipped(seen.facts())}
        began_ms = now_ms - int(own.cost.total_s * 1000)
        child = self._open.create_run(self._experiment, began_ms, tags, own.name).info.run_id
        self._log(child, {name: str(value) for name, value in (own.params or {}).items()}, seen.figures())
        self._open.log_text(child, to_yaml(own.recipe), "recipe.yaml")
        if (items := self._run.measurement_file(own.name)) is not None:
            self._open.log_artifact(child, str(items))
        self._open.set_terminated(child, _STATUS[own.state])
        self._children[own.name] = child

    def finish(self, ended: Ended) -> None:
        """Say which merges are on the front and which is recommended; add the report."""
        for name, probability in ended.run.front.items():
            self._log(self._children[name], {}, ended.figures(name))
            self._open.set_tag(self._children[name], "front", f"{probability:.2f}")
        if (chosen := ended.run.recommended) is not None:
            self._log(self._parent, {}, ended.figures(chosen))
            self._open.set_tag(self._children[chosen], "recommended", "true")
            self._open.set_tag(self._parent, "recommended", chosen)
        self._open.log_artifacts(self._parent, str(ended.report.parent), "report")
        self._open.set_terminated(self._parent, "FINISHED")
        self._has_ended = True

    def close(self) -> None:
        """Say that a study was broken off, where it has not come to its end."""
        if self._client is not None and self._parent and not self._has_ended:
            self._client.set_terminated(self._parent, "KILLED")

    @property
    def _open(self) -> MlflowClient:
        assert self._client is not None  # connected before
        return self._client

    def _begin(self) -> str:
        name = self._run.watched_as()
        parent = self._open.create_run(self._experiment, tags={_STUDY: name}, run_name=name).info.run_id
        self._log(str(parent), study_facts(self._run), {})
        self._open.log_artifact(parent, str(self._run.path / "study.yaml"))
        return str(parent)

    def _search(self, condition: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._open.search_runs([self._experiment], condition, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _log(self, run: str, params: Mapping[str, str], figures: Mapping[str, float]) -> None:
        """Log parameters, and metrics that are not as they were, as many at once as a server takes."""
        from mlflow.entities import Metric, Param

        now_ms = int(time.time() * 1000)
        rows = [*_clipped(params).items()]
        for begin in range(0, len(rows), _MOST_AT_ONCE):
            own = [Param(name, value) for name, value in rows[begin : begin + _MOST_AT_ONCE]]
            self._open.log_batch(run, params=own)
        known = self._open.get_run(run).data.metrics
        wanted = {_plain(name): value for name, value in figures.items()}
        metrics = [
            Metric(name, value, now_ms, 0) for name, value in wanted.items() if known.get(name) != value
        ]
        for begin in range(0, len(metrics), _MOST_AT_ONCE):
            self._open.log_batch(run, metrics=metrics[begin : begin + _MOST_AT_ONCE])


def _plain(name: str) -> str:
    """Return a name in the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _clipped(texts: Mapping[str, str]) -> dict[str, str]:
    return {_plain(name): text[:_MOST_CHARACTERS] for name, text in texts.items()}
