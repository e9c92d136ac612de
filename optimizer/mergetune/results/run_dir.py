"""The run directory: all that a study learned, each file written whole or not at all.

study.yaml        the study file, hub ids pinned, paths made absolute; it can be run again as it is
record.json       the same with the suite's rules and the digests of all inputs
versions.json     the engine, and versions of mergetune and the libraries that numbers depend on
warnings.json     what looked suspicious before the search began
model.json        the base's layers and tensors, those each expert changes, and the task vectors' norms
study.journal     Optuna's storage
watched_as.json   the name of this run where others watch it: in a database, MLflow or W&B
wandb/            what W&B keeps on disk
items.parquet     every item of the suite: id, split, prompt, target
judges.json       how far the judges of the suite agree with people's labels
sent.parquet      what models were sent of each item, as the chat template wrote it
candidates/       NAME.json: recipe, state, cost; NAME.SPLIT.parquet: its per-item scores;
                  NAME.part.parquet: those of a candidate that was dropped on part of the search split
attempts/         WHAT.json: how often something was begun that has not come to its end
replies/          what each candidate replied, by the digest of its recipe and of the request
coordinates.json  what the numbers of a candidate's point stand for
search.json       why the search ended
warm_start.json   where slopes led to, where they go on, and what that cost
noise.parquet     the base measured once more on the search split
sensitivity.parquet  the slopes of every score at the base, the average and the recommended merge
seconds.json      what the second measurement of the base and those slopes took
holdout.json      when the holdout split was used, and for which finalists
lock              held by the process that is at work here
run.log           what happened, with times
engine.log        what vLLM said
self_test.json    how exactly vLLM follows a swap of weights
base/             the base with the tokens that experts added, where there are any
report/           the report
best/             the recommended merge, a model directory
adapter/          the same as one LoRA adapter, where the study exports one
adapter.json      how near that adapter comes to the merge; adapter.parquet: what it scored as it is
quantized/        the recommended merge quantized, where the study deploys it so
quantized.json    what was quantized, and by what; quantized.parquet: what it scored
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from filelock import FileLock, Timeout
from pyarrow import parquet
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from mergetune.engines.engine import EngineKind
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import ITEM_KEYS, Measurement, Score
from mergetune.evaluation.judging.agreement import Agreement, Agreements
from mergetune.evaluation.suite import Split, SuiteConfig
from mergetune.files.atomic_files import TEMPORARY, write_parquet, write_text
from mergetune.files.yaml_io import Strict, write_yaml
from mergetune.results.config import StudyConfig
from mergetune.results.roles import SEARCHED, Role, role_of, slopes_name
from mergetune.space.coordinates import Coordinate
from mergetune.space.recipe import MergeRecipe
from mergetune.space.stack import ModelReference
from mergetune.weights.models import reference_to

# What may be there before the record is; `.base.…` and `….tmp` were being written when a run was killed.
_EARLY = re.compile(r"lock|base|\.base\..*|record\.json\..*\.tmp")

# what may change when a study goes on
_FREE = dict.fromkeys(
    (
        *("budget", "elimination", "export", "deploy", "finalists", "training_data"),
        *("allow_flat_objectives", "cache", "on_finish", "storage", "loggers"),
    ),
    True,
)

_TEXTS = ("response", "reason")  # the columns of a measurement that no figure needs

_WHERE = {"workers", "ray_address"}  # of the engine's options: where it runs, and not how

# A model as recipes name it; records of earlier versions hold the place of a hub id in the cache.
_Reference = Annotated[
    ModelReference,
    AfterValidator(lambda given: reference_to(Path(given)) if isinstance(given, str) else given),
]

Kept = Split | Literal["part"]  # of the search split, where a candidate was dropped
SpaceKind = Literal["search_space", "front"]  # the study's own, or the one around the points of a warm start


class StudyRecord(StudyConfig):
    """The study as it was resolved: hub ids pinned, absolute paths, and what its inputs held."""

    suite_name: str
    suite_config: SuiteConfig
    digests: dict[str, str]  # of the suite, the search space, the base and each expert
    base: _Reference
    experts: dict[str, _Reference]


class Cost(Strict):
    """Where a candidate's time went, in seconds, and how many items it was scored on.

    `lost_s` went into attempts that broke, and into the engine's new starts after them. `elapsed_s` is, where
    several were measured side by side, this one's share of the time that passed.
    """

    merge_s: float = 0.0
    load_s: float = 0.0
    evaluate_s: float = 0.0
    lost_s: float = 0.0
    elapsed_s: float | None = None
    n_items: int = 0

    def plus(self, other: Cost) -> Cost:
        """Return the sum, field by field."""
        return Cost(
            merge_s=self.merge_s + other.merge_s,
            load_s=self.load_s + other.load_s,
            evaluate_s=self.evaluate_s + other.evaluate_s,
            lost_s=self.lost_s + other.lost_s,
            n_items=self.n_items + other.n_items,
        )

    @property
    def total_s(self) -> float:
        """Return all seconds of the engine together."""
        return self.merge_s + self.load_s + self.evaluate_s + self.lost_s

    @property
    def spent_s(self) -> float:
        """Return what it takes from a budget of hours."""
        return self.total_s if self.elapsed_s is None else self.elapsed_s


class Candidate(Strict):
    """One model of the study.

    `number` counts the candidates in the order measured; `params` is its point in the space that `space`
    names, None if the recipe lies outside. `faults` says how the engine broke before it could be measured.
    A candidate is `dropped` on part of its items where all of them would not put it on the front.
    """

    name: str
    number: int
    role: Role
    recipe: MergeRecipe
    params: dict[str, float] | None = None
    space: SpaceKind = "search_space"
    state: Literal["complete", "dropped", "failed"] = "complete"
    reason: str | None = None
    faults: tuple[str, ...] = ()
    cost: Cost = Field(default_factory=Cost)
    holdout_cost: Cost = Field(default_factory=Cost)

    @property
    def is_baseline(self) -> bool:
        """Say whether it is measured before the search, and has to be."""
        return self.role not in SEARCHED

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, data: object) -> object:
        """Tell by names which role it has and which space its point is of, where a file does not say it."""
        if not isinstance(data, dict):
            return data
        if "kind" in data and "name" in data:
            data = {name: value for name, value in data.items() if name != "kind"}
            data["role"] = role_of(data["name"])
        if "space" in data:
            return data
        is_front = any(name.startswith(("toward.", "times.")) for name in data.get("params") or ())
        return {**data, "space": "front"} if is_front else data


class Attempts(Strict):
    """How often something was begun that has not come to its end.

    `of` is the digest of the recipe, where it is about one; `faults` says how attempts ended, as far as
    anything could still be said of them; `host` is the machine of the worker that the last began on, if any.
    """

    of: str = ""
    begun: int = 0
    host: str = ""
    faults: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Say how the attempts ended."""
        n_silent = self.begun - len(self.faults)
        times = {1: "once", 2: "twice"}.get(n_silent, f"{n_silent} times")
        silent = f"{times} the process ended in the middle of it (killed, perhaps for want of memory)"
        return f"begun {self.begun} times: {'; '.join((*self.faults, *([silent] if n_silent else [])))}"

    def with_another(self, host: str = "") -> Attempts:
        """Return these and one more."""
        return self.model_copy(update={"begun": self.begun + 1, "host": host})

    def with_fault(self, fault: str) -> Attempts:
        """Return these, with how the last one ended."""
        return self.model_copy(update={"faults": (*self.faults, fault)})

    def with_one_less(self) -> Attempts:
        """Return these without the last one."""
        return self.model_copy(update={"begun": max(self.begun - 1, 0)})


class WarmStart(Strict):
    """What following the slopes led to, and what it cost.

    `points` are points of the space descended in, by candidate, settled at the end, that a sampler searches
    around, the best first; `reason` says why slopes were not followed, or not further. `full_evaluations`
    counts forward passes of one text, a backward pass as two, in evaluations of the search split. The file
    also holds what the descent goes on from.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    points: dict[str, dict[str, float]] = Field(default_factory=dict)
    reason: str | None = None
    full_evaluations: float = 0.0
    seconds: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, data: object) -> object:
        """Name the points by their candidates, which earlier versions listed in their order."""
        if not isinstance(data, dict) or not isinstance(data.get("points"), list):
            return data
        points = {slopes_name(number): point for number, point in enumerate(data["points"], start=1)}
        return {**data, "points": points}

    @property
    def is_over(self) -> bool:
        """Say whether no more slopes are followed."""
        return bool(self.points) or self.reason is not None


Form = Literal["adapter", "quantized"]


class FormRecord(Strict):
    """The recommended merge in another form: whose it is, what it is in sentences, and where it was scored.

    `of` is the candidate. `split` is None where it was not: an exact adapter scores as its merge does.
    """

    of: str
    summary: tuple[str, ...]
    split: Split | None = None


class HoldoutUse(Strict):
    """One use of the holdout split: the finalists, best first, fixed before any was measured on it.

    `n_candidates` is how many they were chosen among.
    """

    at: datetime
    finalists: tuple[str, ...]
    n_candidates: int


@dataclass(frozen=True)
class RunDir:
    """A run directory, for the study that writes it and the reports that read it."""

    path: Path

    @property
    def study(self) -> StudyRecord:
        """Return the study as resolved; raises `MergetuneError` where this is no run directory."""
        if not self._record_file.is_file():
            raise MergetuneError(f"{self.path}: is no run directory (it has no record.json).")
        with readable(
            self._record_file, "Put it back, or run the study.yaml beside it into a new directory."
        ):
            return StudyRecord.model_validate_json(self._record_file.read_text(encoding="utf-8"))

    @contextmanager
    def claim(self, study: StudyRecord) -> Iterator[None]:
        """Hold the directory for this study; the lock ends with the block, or with the process.

        Raises:
            MergetuneError: another process holds it, it belongs to another study, or it holds files
                of something else.
        """
        self.check_own()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise MergetuneError(f"{self.path}: another `mergetune run` is at work in it.") from error
        try:
            if self._record_file.exists():
                self._check_same(study)
            self._sweep()
            write_text(self._record_file, study.model_dump_json(by_alias=True, indent=1))
            runnable = study.model_dump(include=set(StudyConfig.model_fields))
            write_yaml(self.path / "study.yaml", StudyConfig.model_validate(runnable))
            (self.path / "candidates").mkdir(exist_ok=True)
            yield
        finally:
            lock.release()

    def check_own(self) -> None:
        """Raise `MergetuneError` if the directory holds files of something else."""
        if self.path.exists() and not self.path.is_dir():
            raise MergetuneError(f"{self.path}: must be a run directory, but is a file. Give another --out.")
        if not self.path.is_dir() or self._record_file.exists():
            return
        if not all(_EARLY.fullmatch(entry.name) for entry in self.path.iterdir()):
            raise MergetuneError(f"{self.path}: holds other files. Give a new run directory.")

    def set_aside_broken(self) -> list[str]:
        """Rename files of candidates that cannot be read, so that these are measured again.

        Returns a warning for each.
        """
        warnings = []
        for file in sorted((self.path / "candidates").iterdir()):
            try:
                if file.suffix == ".json":
                    _read_candidate(file)
                elif file.suffix == ".parquet":
                    with readable(file):
                        parquet.read_schema(file)
            except MergetuneError as error:
                aside = file.replace(file.with_name(f"{file.name}.broken"))
                warnings.append(
                    f"{file} cannot be read ({error.__cause__}). It is kept as {aside.name}, and what it "
                    "held is measured again."
                )
        return warnings

    def write_candidate(self, candidate: Candidate, measurement: Measurement | None) -> None:
        """Keep a candidate; its scores go first, so that a candidate on disk is always whole."""
        if measurement is not None:
            self.write_measurement(candidate.name, "search", measurement)
        write_text(self._file(candidate.name, "json"), candidate.model_dump_json(by_alias=True, indent=1))

    def candidates(self) -> list[Candidate]:
        """Return the candidates in the order measured."""
        found = map(_read_candidate, (self.path / "candidates").glob("*.json"))
        return sorted(found, key=lambda candidate: candidate.number)

    def candidate(self, name: str) -> Candidate | None:
        """Return one candidate, None where there is none of this name."""
        file = self._file(name, "json")
        return _read_candidate(file) if file.is_file() else None

    def write_measurement(self, name: str, split: Kept, measurement: Measurement) -> None:
        """Keep the per-item scores of a candidate on one split."""
        write_parquet(self._file(name, f"{split}.parquet"), measurement.items)

    def measurement(self, name: str, split: Kept, responses: bool = True) -> pd.DataFrame | None:
        """Return the per-item scores of a candidate on one split, None where it was not measured.

        Without `responses`, what model and judge said is left on disk: most of a file, and most of its table.
        """
        left_out = () if responses else _TEXTS
        return _read_table(self._file(name, f"{split}.parquet"), left_out)

    def measurement_file(self, name: str) -> Path | None:
        """Return the file of what a candidate scored on the search split, or on part of it, if any."""
        files = (self._file(name, f"{split}.parquet") for split in ("search", "part"))
        return next((file for file in files if file.is_file()), None)

    def holds_measurement(self, name: str, split: Split) -> bool:
        """Say whether a candidate was measured on one split."""
        return self._file(name, f"{split}.parquet").is_file()

    def scores(self, name: str, split: Kept) -> dict[str, Score] | None:
        """Return the scores of a candidate on one split, None where it was not measured."""
        items = self.measurement(name, split, responses=False)
        return None if items is None else Measurement(items, 0.0).scores()

    def all_scores(self, split: Kept) -> dict[str, dict[str, Score]]:
        """Return the scores of every candidate measured on a split, in the candidates' order."""
        found = {candidate.name: self.scores(candidate.name, split) for candidate in self.candidates()}
        return {name: scores for name, scores in found.items() if scores is not None}

    def write_coordinates(self, coordinates: Mapping[str, Coordinate]) -> None:
        """Keep what the numbers of the candidates' points stand for, by their names."""
        self.write_json("coordinates.json", {key: each.model_dump() for key, each in coordinates.items()})

    def coordinates(self) -> dict[str, Coordinate]:
        """Return what the numbers of points stand for; empty in a run of an earlier version."""
        with readable(self.path / "coordinates.json"):
            known = self.read_json("coordinates.json") or {}
            return {key: Coordinate.model_validate(each) for key, each in known.items()}

    def watched_as(self) -> str:
        """Return this run's name where others watch it: the folder's, and letters that no other run has.

        It is made at the first call and stays, whatever the folder is called later.
        """
        known = self.read_json("watched_as.json")
        if known is None:
            folder = re.sub(r"[^\w.-]+", "-", self.path.resolve().name)
            known = f"{folder}-{secrets.token_hex(4)}"
            self.write_json("watched_as.json", known)
        return str(known)

    def write_warm_start(self, record: WarmStart) -> None:
        """Keep what following the slopes led to, and all else that the record holds to go on from."""
        self.write_json("warm_start.json", record.model_dump(mode="json"))

    def warm_start_record(self) -> dict[str, Any] | None:
        """Return what `write_warm_start` kept, None before slopes were followed."""
        with readable(self.path / "warm_start.json"):
            found: dict[str, Any] | None = self.read_json("warm_start.json")
            return found

    def warm_start(self) -> WarmStart | None:
        """Return what following the slopes led to, None before that was tried."""
        found = self.warm_start_record()
        with readable(self.path / "warm_start.json"):
            return None if found is None else WarmStart.model_validate(found)

    def attempts(self, what: str, of: str = "") -> Attempts:
        """Return the attempts at something that were begun and came to no end.

        Args:
            what: names it, and a file.
            of: the digest of its recipe; attempts at another one do not count.
        """
        found = self._read_attempts(self._attempts_file(what))
        return found if found is not None and found.of == of else Attempts(of=of)

    def all_attempts(self) -> dict[str, Attempts]:
        """Return the attempts at everything that was begun and came to no end, in the order of names."""
        files = sorted((self.path / "attempts").glob("*.json"))
        found = {file.stem: self._read_attempts(file) for file in files}
        return {what: each for what, each in found.items() if each is not None}

    def begin_attempt(self, what: str, of: str = "", host: str = "") -> None:
        """Count an attempt; that is on disk before this returns, whatever becomes of this process then."""
        self._write_attempts(what, self.attempts(what, of).with_another(host))

    def add_fault(self, what: str, of: str, fault: str) -> None:
        """Keep how the attempt begun last ended; it still counts."""
        self._write_attempts(what, self.attempts(what, of).with_fault(fault))

    def take_back_attempt(self, what: str, of: str = "") -> None:
        """Count the attempt begun last no more."""
        known = self.attempts(what, of).with_one_less()
        if known.begun > 0:
            self._write_attempts(what, known)
        else:
            self.forget_attempts(what)

    def forget_attempts(self, what: str) -> None:
        """Count no attempt any more: it came to its end, or is to be tried anew."""
        self._attempts_file(what).unlink(missing_ok=True)

    def add_seconds(self, what: str, seconds: float) -> None:
        """Add to the seconds of something that is measured beside the candidates."""
        known = self._seconds()
        self.write_json("seconds.json", {**known, what: known.get(what, 0.0) + seconds})

    def spent_s(self, candidates: Iterable[Candidate] | None = None) -> float:
        """Return the seconds that went into measuring and following slopes, before the search and after it.

        Failed candidates, the base's second measurement and the final slopes are among them; the holdout is
        not. Only what is on disk counts, so that a study that goes on ends where it would have ended.

        Args:
            candidates: the run's, where they are at hand; by default they are read.
        """
        start = self.warm_start()
        known = self.candidates() if candidates is None else candidates
        measured = sum(candidate.cost.spent_s for candidate in known)
        return measured + (start.seconds if start else 0.0) + sum(self._seconds().values())

    def write_noise(self, measurement: Measurement) -> None:
        """Keep the second measurement of the base on the search split."""
        write_parquet(self.path / "noise.parquet", measurement.items)

    def noise(self) -> pd.DataFrame | None:
        """Return the per-item scores of the base's second measurement, None before there is one."""
        return _read_table(self.path / "noise.parquet")

    def write_sensitivity(self, frame: pd.DataFrame) -> None:
        """Keep the slopes of every score; see `measure_sensitivity`."""
        write_parquet(self.path / "sensitivity.parquet", frame)

    def sensitivity(self) -> pd.DataFrame | None:
        """Return the slopes of every score, None where they were not measured."""
        return _read_table(self.path / "sensitivity.parquet")

    def write_form(self, form: Form, record: FormRecord, measurement: Measurement | None) -> None:
        """Keep what the recommended merge is in another form, and the per-item scores of that."""
        if measurement is not None:
            write_parquet(self.path / f"{form}.parquet", measurement.items)
        self.write_json(f"{form}.json", record.model_dump(mode="json"))

    def form(self, form: Form) -> FormRecord | None:
        """Return what the recommended merge is in another form, None where it was not written so."""
        with readable(self.path / f"{form}.json"):
            found = self.read_json(f"{form}.json")
            return None if found is None else FormRecord.model_validate(found)

    def form_items(self, form: Form) -> pd.DataFrame | None:
        """Return the per-item scores of the recommended merge in another form, None before there are any."""
        return _read_table(self.path / f"{form}.parquet", _TEXTS)

    def add_holdout_use(self, use: HoldoutUse) -> None:
        """Write down that the holdout split is about to be used."""
        uses = [*self.holdout_uses(), use]
        self.write_json("holdout.json", [each.model_dump(mode="json") for each in uses])

    def holdout_uses(self) -> tuple[HoldoutUse, ...]:
        """Return the uses of the holdout split in their order; more than one is one too many."""
        with readable(self.path / "holdout.json"):
            return tuple(HoldoutUse.model_validate(use) for use in self.read_json("holdout.json") or ())

    def write_items(self, items: pd.DataFrame) -> None:
        """Keep the suite's items.

        Raises:
            MergetuneError: others are here, which what was measured belongs to.
        """
        known = _read_table(self.path / "items.parquet")
        columns = list(items) if known is None else [name for name in items if name in known]
        if known is not None and (was := _rows(known[columns])) != (now := _rows(items[columns])):
            raise MergetuneError(
                f"{self.path}: the suite's items have changed since the run began: {len(was - now)} are gone "
                f"or asked otherwise, {len(now - was)} are new. What was measured cannot be compared with "
                "what would be. Take a new run directory, or take the change back."
            )
        write_parquet(self.path / "items.parquet", items)

    def items(self) -> pd.DataFrame:
        """Return the suite's items, as `Evaluator.items` has them; earlier versions kept fewer columns."""
        with readable(self.path / "items.parquet"):
            return pd.read_parquet(self.path / "items.parquet")

    def add_sent(self, sent: pd.DataFrame) -> None:
        """Keep what models were sent, as `Evaluator.sent` has it, beside what is known of other items."""
        both = [frame for frame in (self.sent(), sent) if frame is not None]
        write_parquet(self.path / "sent.parquet", pd.concat(both).drop_duplicates(ITEM_KEYS))

    def sent(self) -> pd.DataFrame | None:
        """Return what models were sent, by item; None in a run of an earlier version."""
        return _read_table(self.path / "sent.parquet")

    def write_agreements(self, agreements: Agreements) -> None:
        """Keep how far judges agree with people, as `Evaluator.agreements` has it."""
        rows = {
            score: {task: asdict(own) for task, own in tasks.items()} for score, tasks in agreements.items()
        }
        self.write_json("judges.json", rows)

    def agreements(self) -> dict[str, dict[str, Agreement]]:
        """Return how far judges agree with people, by score and task; empty where none has labels."""
        with readable(self.path / "judges.json"):
            known = self.read_json("judges.json") or {}
            return {
                score: {task: Agreement(**own) for task, own in tasks.items()}
                for score, tasks in known.items()
            }

    def write_json(self, name: str, data: Any) -> None:
        """Write one of the small JSON files."""
        write_text(self.path / name, json.dumps(data, indent=1, ensure_ascii=False))

    def read_json(self, name: str) -> Any:
        """Read one of the small JSON files; None where it is missing."""
        file = self.path / name
        with readable(file):
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def versions(self) -> dict[str, Any]:
        """Return what `write_versions` kept last; empty before that."""
        return self.read_json("versions.json") or {}

    def write_versions(self, kind: EngineKind, versions: Mapping[str, str]) -> None:
        """Keep the engine that measures, and the versions of the libraries that numbers depend on."""
        self.write_json("versions.json", {"engine": kind, **versions})

    @property
    def extended_base(self) -> Path:
        """Where the base with the tokens that experts added stands."""
        return self.path.resolve() / "base"

    def _sweep(self) -> None:
        """Remove what was being written when an earlier run was killed; nobody else writes here now."""
        for folder in (self.path, self.path / "candidates", self.path / "attempts", self.path / "replies"):
            for path in folder.glob(f"*{TEMPORARY}"):
                path.unlink()
        for pattern in (".best.*", ".base.*", ".adapter.*", ".quantized.*"):
            for folder in self.path.glob(pattern):
                shutil.rmtree(folder)

    def _seconds(self) -> dict[str, float]:
        return self.read_json("seconds.json") or {}

    def _attempts_file(self, what: str) -> Path:
        return self.path / "attempts" / f"{what}.json"

    def _read_attempts(self, file: Path) -> Attempts | None:
        """Read attempts that another process may forget meanwhile."""
        with readable(file):
            try:
                return Attempts.model_validate_json(file.read_text(encoding="utf-8"))
            except FileNotFoundError:
                return None

    def _write_attempts(self, what: str, attempts: Attempts) -> None:
        file = self._attempts_file(what)
        file.parent.mkdir(exist_ok=True)
        write_text(file, attempts.model_dump_json())

    @property
    def _record_file(self) -> Path:
        return self.path / "record.json"

    def _file(self, name: str, suffix: str) -> Path:
        return self.path / "candidates" / f"{name}.{suffix}"

    def _check_same(self, study: StudyRecord) -> None:
        """Refuse a study that differs from the one here in more than what no measurement depends on."""
        old, new = (
            _flat(each.model_dump(mode="json", exclude={**_FREE, "engine": _WHERE}))
            for each in (self.study, study)
        )
        changed = [
            f"  {key}: was {old.get(key, 'absent')!r}, is {new.get(key, 'absent')!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if not changed:  # experts are summed in their order, and a trial's values have the objectives'
            moved = [pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]]
            changed = [f"  the order changed: {now} is where {was} was" for was, now in moved[:1]]
        if changed:
            free = "`, `".join(sorted(_FREE))
            raise MergetuneError(
                f"{self.path}: holds another study; only `{free}` and the workers may change when it "
                "goes on.\n" + "\n".join(changed) + "\nGive a new run directory, or take the changes back."
            )


def searched(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates that are points of the space which the search went on in: never of two spaces."""
    inside = [candidate for candidate in candidates if candidate.params is not None]
    around = [candidate for candidate in inside if candidate.space == "front"]
    return around or inside


@contextmanager
def readable(
    path: Path,
    remedy: str = "Delete it and run again: what it held is lost, or measured anew where it is needed.",
) -> Iterator[None]:
    """Name the file, and what to do, in the error of a block that reads it and finds it broken."""
    try:
        yield
    except (OSError, ValueError) as error:  # those of pydantic, json and pyarrow are
        reason = " ".join(str(error).split())
        raise MergetuneError(f"{path}: cannot be read ({reason:.150}). {remedy}") from error


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send all log records to a file, with times, while the block runs."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("mergetune").setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _read_candidate(file: Path) -> Candidate:
    with readable(file):
        return Candidate.model_validate_json(file.read_text(encoding="utf-8"))


def _read_table(file: Path, left_out: Sequence[str] = ()) -> pd.DataFrame | None:
    with readable(file):
        if not file.is_file():
            return None
        columns = [name for name in parquet.read_schema(file).names if name not in left_out]
        return pd.read_parquet(file, columns=columns)


def _rows(items: pd.DataFrame) -> set[tuple[str, ...]]:
    return set(map(tuple, items.astype(str).to_numpy().tolist()))


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        parts = [_flat(value, f"{path}.{key}" if path else str(key)) for key, value in data.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {path: data}
