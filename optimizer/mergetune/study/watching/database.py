"""The mirror of a study in a database, for dashboards: Optuna's tables, filled from the run directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import SuiteConfig
from mergetune.files.secret_url import filled, without_password
from mergetune.files.yaml_io import nearest
from mergetune.results.run_dir import RunDir
from mergetune.space.coordinates import Coordinate
from mergetune.study.search import listed, name_objectives, quiet
from mergetune.study.watching.seen import Ended, Seen, key

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

_STATES = {
    "complete": TrialState.COMPLETE,
    "dropped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_OURS = {"candidate", "recipe"}  # the user attributes that our trials are told apart by
_CONNECT_S = 10  # how long a server may take to answer
_WITH_TIMEOUT = {"psycopg", "psycopg2", "pymysql", "mysqldb"}  # drivers that take `connect_timeout`


class Database:
    """A study's mirror in a database: each candidate is a trial there, once.

    What Optuna is told in `study.journal` serves its sampler; here stands what happened. A dropped trial is
    pruned, a failed one has failed, and baselines that are no points of a search space have no parameters.

    Args:
        url: as SQLAlchemy takes it; see `secret_url`.
        run: the run directory.

    Raises:
        MergetuneError: there is no such database, or its driver is not installed.
    """

    def __init__(self, url: str, run: RunDir) -> None:
        self.name, self._run = "storage", run
        self._url = _checked(filled(url, "storage"))
        self.secret = self._url.render_as_string(hide_password=False)
        self._storage: RDBStorage | None = None
        self._study: optuna.Study | None = None
        self._ranges: Mapping[str, Coordinate] = {}

    def connect(self, keys: Collection[str]) -> Collection[str]:
        """Open the study in the database, new or going on; returns the keys of the candidates there.

        A study there that has others is one of an earlier state of the run directory, and is written anew.

        Args:
            keys: of the candidates in the run directory.
        """
        quiet()
        self.close()
        storage = self._storage = RDBStorage(self.secret, _options(self._url))
        found = self._open(storage)
        ours = (
            trial.user_attrs for trial in found.get_trials(deepcopy=False) if trial.user_attrs.keys() >= _OURS
        )
        held = {key(each["candidate"], each["recipe"]) for each in ours}
        if not held <= set(keys):
            optuna.delete_study(study_name=found.study_name, storage=storage)
            found, held = self._open(storage), set()
        self._study = found
        return held

    def show(self, seen: Seen) -> None:
        """Add a candidate as a trial, all of it or nothing."""
        assert self._study is not None  # connected before
        self._study.add_trial(self._trial(seen))

    def finish(self, ended: Ended) -> None:
        """Say which merge is recommended, which are on the front, and where the report is."""
        assert self._study is not None  # connected before
        self._study.set_user_attr("recommended", ended.run.recommended)
        self._study.set_user_attr("front", list(ended.run.front))
        self._study.set_user_attr("report", str(ended.report.resolve()))

    def close(self) -> None:
        """Close the connections."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()

    def _open(self, storage: RDBStorage) -> optuna.Study:
        suite = self._suite
        found = optuna.create_study(
            study_name=self._run.watched_as(),
            storage=storage,
            directions=[objective.better for objective in suite.objectives.values()],
            load_if_exists=True,
        )
        name_objectives(found, list(suite.objectives))
        if "run" not in found.user_attrs:
            found.set_user_attr("run", str(self._run.path.resolve()))
        return found

    @property
    def _suite(self) -> SuiteConfig:
        return self._run.study.suite_config

    def _trial(self, seen: Seen) -> FrozenTrial:
        own, scores = seen.candidate, seen.scores
        params = own.params or {}
        if not params.keys() <= self._ranges.keys():
            self._ranges = self._run.coordinates()
        trial = optuna.trial.create_trial(
            state=_STATES[own.state],
            values=[scores[name].value for name in self._suite.objectives] if scores else None,
            params=params,
            distributions={key: _range(self._ranges.get(key), value) for key, value in params.items()},
            user_attrs={**seen.facts(), **seen.figures()},
            system_attrs=listed(seen.excess),
        )
        now = datetime.now()
        trial.datetime_start, trial.datetime_complete = now - timedelta(seconds=own.cost.total_s), now
        return trial


def _checked(text: str) -> URL:
    """Return a URL whose database SQLAlchemy knows and whose driver is there."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = make_url(text)
        if url.drivername == "postgresql":  # SQLAlchemy 2.0 would take psycopg2
            url = url.set(drivername="postgresql+psycopg")
        url.get_dialect().import_dbapi()
    except NoSuchModuleError as error:
        kind = text.partition(":")[0]
        raise MergetuneError(
            f"`storage` must be a database that SQLAlchemy knows, but got `{kind}://…`."
            f"{nearest(kind, ('postgresql', 'mysql', 'mariadb', 'sqlite', 'oracle', 'mssql'))}"
        ) from error
    except (ArgumentError, ValueError) as error:
        raise MergetuneError(
            "`storage` must be a URL such as postgresql://user@host/database, but got "
            f"`{without_password(text)}`."
        ) from error
    except ImportError as error:
        driver = url.get_dialect().driver
        package = "'.[postgresql]'" if driver == "psycopg" else f"the package of `{driver}`"
        raise MergetuneError(
            f"`storage: {url.drivername}://…` needs the driver `{driver}`, which cannot be imported "
            f"({error}). Install it: pip install {package}"
        ) from error
    return url


def _options(url: URL) -> dict[str, Any]:
    """Return the options of SQLAlchemy's engine: a connection that has ended is found out and made anew."""
    has_timeout = url.get_dialect().driver in _WITH_TIMEOUT and "connect_timeout" not in url.query
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_S} if has_timeout else {}}


def _range(coordinate: Coordinate | None, value: float) -> FloatDistribution:
    """Return a parameter's range; that of its value alone in a run of an earlier version."""
    if coordinate is None or coordinate.low is None or coordinate.high is None:
        return FloatDistribution(value, value)
    return FloatDistribution(coordinate.low, coordinate.high, step=coordinate.step)
