"""The meter: one model's answers to any items of a suite, measured once and kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pandas as pd

from optimizer.engines.choice import installed_version
from optimizer.engines.engine import EngineConfig
from optimizer.errors import MergetuneError, StartError
from optimizer.evaluate import ITEM_KEYS, Documents, Evaluator
from optimizer.measurement_store import MeasurementStore, no_answers
from optimizer.model_under_test import ModelUnderTest

if TYPE_CHECKING:
    from lm_eval.api.model import LM

_AT_A_TIME = 512  # items between two writes to the store
_HARMLESS = {"batch_size", "timeout_s", "gpu_memory_utilization", "kv_cache_gib", "server"}  # to answers


class Meter:
    """Measures a model; its engine starts when the first item comes that the store does not hold.

    Args:
        model: what is measured.
        config: the engine's options; `kind` settled, or measurements of two engines would mix.
        evaluator: the suite.
        store: where answers are kept; None, and a served model, which may change unseen: nowhere.
        repeat: 1 for a second measurement of the same model, kept apart from the first.
        say: is told which engine runs.
    """

    def __init__(
        self,
        model: ModelUnderTest,
        config: EngineConfig,
        evaluator: Evaluator,
        store: MeasurementStore | None,
        say: Callable[[str], None],
        repeat: int = 0,
    ) -> None:
        self.model, self._config, self._evaluator, self._say = model, config, evaluator, say
        self._store = store if model.digest is not None else None
        self._name = _name(model.digest, config, repeat) if model.digest is not None else ""
        self._engine = ExitStack()
        self._lm: LM | None = None
        self.n_measured = 0

    def close(self) -> None:
        """End the engine, if it was started."""
        self._engine.close()

    def measure(self, documents: Documents) -> pd.DataFrame:
        """Return score_name, task, item, score and response of every document, in their order.

        Raises:
            StartError: the model cannot be started.
            MergetuneError: it cannot be scored; what was measured before is kept.
        """
        wanted = self._evaluator.keys(documents)
        known = self._known(wanted)
        missing = wanted[~wanted["key"].isin(known["key"])]
        once = missing.drop_duplicates("key")  # an item may stand in several scores
        known = pd.concat([known, *(self._measure(part) for part in _parts(once))])
        self.n_measured += len(missing)
        rows = wanted.merge(known, on="key", how="left", validate="many_to_one")
        return rows[[*ITEM_KEYS, "score", "response"]]

    def _known(self, wanted: pd.DataFrame) -> pd.DataFrame:
        if self._store is None:
            return no_answers()
        known = self._store.read(self._name)
        return known[known["key"].isin(wanted["key"])]

    def _measure(self, rows: pd.DataFrame) -> pd.DataFrame:
        documents = {str(task): list(own["document"]) for task, own in rows.groupby("task", sort=False)}
        found = self._evaluator.measure_documents(self._started(), documents).items
        answers = rows.merge(found, on=["task", "item"])[["key", "score", "response"]]
        if self._store is not None:
            self._store.add(self._name, answers)
        return answers

    def _started(self) -> LM:
        if self._lm is None:
            try:
                self._lm = self._engine.enter_context(self.model.started(self._config, self._say))
            except MergetuneError as error:
                raise StartError(str(error)) from error
        return self._lm


def _parts(missing: pd.DataFrame) -> Iterator[pd.DataFrame]:
    for start in range(0, len(missing), _AT_A_TIME):
        yield missing.iloc[start : start + _AT_A_TIME]


def _name(digest: str, config: EngineConfig, repeat: int) -> str:
    """Return the digest of a model together with what computes its answers."""
    library = installed_version() if config.kind == "vllm" else importlib.metadata.version("transformers")
    settings = config.model_dump(mode="json", exclude=_HARMLESS)
    text = json.dumps([digest, settings, library, importlib.metadata.version("torch"), repeat])
    return hashlib.sha256(text.encode()).hexdigest()
