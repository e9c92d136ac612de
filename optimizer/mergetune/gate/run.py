"""The check as it runs: both models measured on the suite, or what was measured before, then judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
from pyarrow import parquet

from mergetune.engines.choice import choose_engine
from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError, StartError
from mergetune.evaluation.bound_task import REASON, UNJUDGED, BoundTask
from mergetune.evaluation.evaluate import COLUMNS, ITEM_KEYS, Documents, Evaluator
from mergetune.evaluation.leakage import find_leaks, read_training_texts
from mergetune.evaluation.rules import are_asked_alike
from mergetune.evaluation.suite import Split, Suite
from mergetune.gate.early import Early, measure_until_clear
from mergetune.gate.judge import Check, judge
from mergetune.measuring.model_under_test import LocalModel, ModelUnderTest
from mergetune.measuring.pool import Job, Pool, PoolOptions
from mergetune.measuring.reply_store import ReplyStore

_LATER: dict[str, int | str] = {UNJUDGED: 0, REASON: ""}  # what measurements of earlier versions lack

CheckSplit = Split | Literal["all"]


@dataclass(frozen=True)
class Checked:
    """A check, and the measurements that it stands on."""

    check: Check
    candidate: pd.DataFrame
    baseline: pd.DataFrame
    unquantized: pd.DataFrame | None = None


@dataclass(frozen=True)
class CheckOptions:
    """How a check is made.

    Attributes:
        split: which of the suite's items; None takes the holdout split where the suite has one.
        alpha: one-sided, in (0, 0.5): the error of PASS, and that of FAIL.
        is_fast: stop as soon as the verdict is clear.
        has_noise_floor: measure the baseline twice, and count what differs as noise.
        engine: what both models run in.
        training: files that one of the models was trained on.
    """

    split: CheckSplit | None = None
    alpha: float = 0.05
    is_fast: bool = False
    has_noise_floor: bool = True
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: tuple[Path, ...] = ()


def check_models(
    candidate: ModelUnderTest,
    baseline: ModelUnderTest,
    suite: Suite,
    options: CheckOptions,
    store: ReplyStore,
    say: Callable[[str], object],
    unquantized: ModelUnderTest | None = None,
) -> Checked:
    """Measure two models on a suite, as far as the store does not hold them, and judge the candidate.

    With `unquantized`, the candidate before it was quantized, what quantizing changed is said, too.

    Raises:
        MergetuneError: `unquantized` stands with a check that may stop early, a model cannot be started or
            scored, or the suite's data cannot be had; what was measured before is in the store.
    """
    if unquantized is not None and options.is_fast:
        raise MergetuneError(
            "--unquantized needs all items of the candidate, but --fast may stop before. Leave one out."
        )
    evaluator, split = Evaluator(suite), _split(suite, options)
    items = _in_split(evaluator.items(), split)
    warnings = (*evaluator.warnings, *_warnings(items, options.training))
    for line in (*suite.read_as.values(), *(f"warning: {each}" for each in warnings)):
        say(line)
    documents = evaluator.documents(split)
    pair = _Pair(candidate, baseline, unquantized, evaluator, documents, items, options, warnings, store, say)
    models = [baseline, candidate] if unquantized is None else [baseline, unquantized, candidate]
    engine = _settled(options.engine, models, say)
    try:
        return pair.checked(engine)
    except StartError as error:
        if engine.kind != "vllm" or options.engine.kind != "auto":
            raise
        say(f"engine: transformers for all, since vLLM did not start: {error}")
        return pair.checked(options.engine.model_copy(update={"kind": "transformers"}))


@dataclass(frozen=True)
class _Pair:
    """Two models, maybe one on the way, and all that it takes to measure and judge them."""

    candidate: ModelUnderTest
    baseline: ModelUnderTest
    unquantized: ModelUnderTest | None
    evaluator: Evaluator
    documents: Documents
    items: pd.DataFrame
    options: CheckOptions
    warnings: tuple[str, ...]
    store: ReplyStore
    say: Callable[[str], object]

    def checked(self, engine: EngineConfig) -> Checked:
        """Measure all in one kind of engine, and judge."""
        baseline = self._measured(self.baseline, engine)
        if self.options.is_fast:
            with closing(self._pool(self.candidate, engine)) as pool:
                early = measure_until_clear(pool, baseline, self.documents, self.options.alpha, self.say)
            return self._judged(early.items, baseline, None, early)
        again = self._measured(self.baseline, engine, 1) if self.options.has_noise_floor else None
        origin = None if self.unquantized is None else self._measured(self.unquantized, engine)
        return self._judged(self._measured(self.candidate, engine), baseline, again, None, origin)

    def _measured(self, model: ModelUnderTest, engine: EngineConfig, repeat: int = 0) -> pd.DataFrame:
        with closing(self._pool(model, engine)) as pool:
            found = pool.measured(Job(model.reference, self.documents, repeat=repeat))
        self.say(f"{model.reference}: {found.counted}")
        return found.measurement.items

    def _pool(self, model: ModelUnderTest, engine: EngineConfig) -> Pool:
        options = PoolOptions(say=self.say, on_fault=lambda _, fault: self.say(f"tried again: {fault}"))
        return Pool(model, engine, self.evaluator, self.store, options)

    def _judged(
        self,
        candidate: pd.DataFrame,
        baseline: pd.DataFrame,
        again: pd.DataFrame | None,
        early: Early | None,
        unquantized: pd.DataFrame | None = None,
    ) -> Checked:
        suite = self.evaluator.suite
        check = judge(
            candidate,
            baseline,
            self.items,
            suite.config,
            suite_name=suite.name,
            labels=(self.candidate.reference, self.baseline.reference),
            repeat=again,
            unquantized=unquantized,
            alpha=self.options.alpha,
            warnings=self.warnings,
            agreements=self.evaluator.agreements,
            early=early.looks if early else None,
            levels=early.levels if early else None,
        )
        return Checked(check, candidate, baseline, unquantized)


def check_stored(candidate: Path, baseline: Path, suite: Suite, options: CheckOptions) -> Checked:
    """Judge measurements that `mergetune eval --out` or an earlier check wrote; no model runs.

    Raises:
        MergetuneError: a file is no measurement, or they are not of the same items of this suite.
    """
    evaluator, split = Evaluator(suite), _split(suite, options)
    items = evaluator.items()
    first, second = (_read(file, evaluator, items, split) for file in (candidate, baseline))
    items = _in_split(items, split)
    check = judge(
        first,
        second,
        items,
        evaluator.suite.config,
        suite_name=suite.name,
        labels=(str(candidate), str(baseline)),
        alpha=options.alpha,
        warnings=_warnings(items, options.training),
        agreements=evaluator.agreements,
    )
    return Checked(check, first, second)


def _split(suite: Suite, options: CheckOptions) -> CheckSplit:
    """What a model was tuned on flatters it: where items were held out, they are the ones to check on."""
    return options.split or ("holdout" if suite.config.holdout else "all")


def _settled(
    config: EngineConfig, models: Sequence[ModelUnderTest], say: Callable[[str], object]
) -> EngineConfig:
    """Settle `kind: auto` for all models at once: two engines score a little differently."""
    folders = {model.folder: None for model in models if isinstance(model, LocalModel)}
    if config.kind != "auto" or not folders:
        return config
    chosen = [choose_engine(config, folder) for folder in folders]
    settled, reason = next((each for each in chosen if each[0].kind == "transformers"), chosen[0])
    say(f"engine: {reason}")
    return settled


def _in_split(items: pd.DataFrame, split: CheckSplit) -> pd.DataFrame:
    return items if split == "all" else items[items["split"] == split]


def _warnings(items: pd.DataFrame, training: Sequence[Path]) -> tuple[str, ...]:
    """Say which of the items that are checked on stand in training data, or twice."""
    texts = {str(file): read_training_texts(file) for file in training}
    return find_leaks(items, texts).warnings()


def _by_its_rules(file: Path, bound: BoundTask, rows: pd.DataFrame) -> pd.DataFrame:
    """Return a task's rows by the rules of now: replies to the same questions are scored anew."""
    if (rows["rules"] == bound.rules).all():
        return rows
    if not all(are_asked_alike(own, bound.rules) for own in rows["rules"].unique()):
        raise MergetuneError(
            f"{file}: must be measured by the rules of this suite, but `{bound.name}` was asked otherwise "
            "or, as a task of lm-eval, is scored otherwise: the suite, a task's file or its code has changed "
            "since. Measure the model again."
        )
    try:
        return bound.rescored(rows)
    except MergetuneError as error:
        raise MergetuneError(f"{file}: {error}") from error


def _read(file: Path, evaluator: Evaluator, items: pd.DataFrame, split: CheckSplit) -> pd.DataFrame:
    """Read what was measured on a split of the suite's items, by the rules that hold now."""
    try:
        known = parquet.read_schema(file).names
        lacking = {name: value for name, value in _LATER.items() if name not in known}
        found = pd.read_parquet(file, columns=[name for name in COLUMNS if name not in lacking])
        found = found.assign(**lacking)[COLUMNS]
        found = found.astype({**dict.fromkeys(ITEM_KEYS, str), "score": float})
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise MergetuneError(
            f"{file}: must be a measurement (Parquet with {', '.join(COLUMNS)}), such as "
            f"`mergetune eval --out` writes, but cannot be read: {error}"
        ) from error
    placed = found.merge(items[[*ITEM_KEYS, "split"]], on=ITEM_KEYS, how="left")
    if unknown := int(placed["split"].isna().sum()):
        raise MergetuneError(
            f"{file}: must be a measurement of this suite, but {unknown} of its {len(found)} items are none "
            "of the suite's: the suite has changed since, or it was another. Measure the model again."
        )
    tasks = [_by_its_rules(file, evaluator.tasks[str(name)], own) for name, own in placed.groupby("task")]
    kept = _in_split(pd.concat(tasks).sort_index() if tasks else placed, split)[COLUMNS]
    if kept.empty:
        raise MergetuneError(
            f"{file}: holds no item of the {split} split. Say with --split which items to compare."
        )
    return kept
