"""The meter: one model's scores on any items of a suite, its replies asked for once and kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pandas as pd

from mergetune.engines.choice import installed_version
from mergetune.engines.engine import EngineConfig
from mergetune.errors import MergetuneError, StartError
from mergetune.evaluation.evaluate import Documents, Evaluator
from mergetune.measuring.model_under_test import LocalModel, ModelUnderTest
from mergetune.measuring.reply_store import ReplyStore, StoredLM

if TYPE_CHECKING:
    from lm_eval.api.model import LM

_HARMLESS = {"batch_size", "timeout_s", "gpu_memory_utilization", "kv_cache_gib", "server"}  # to replies


class Meter:
    """Measures a model; its engine starts when the first item comes that the store has no reply to.

    Args:
        model: what is measured.
        config: the engine's options; `kind` settled, or measurements of two engines would mix.
        evaluator: the suite.
        store: where replies are kept; None, and a served model, which may change unseen: nowhere.
        repeat: 1 for a second measurement of the same model, kept apart from the first.
        say: is told which engine runs.
    """

    def __init__(
        self,
        model: ModelUnderTest,
        config: EngineConfig,
        evaluator: Evaluator,
        store: ReplyStore | None,
        say: Callable[[str], None],
        repeat: int = 0,
    ) -> None:
        self.model, self._config, self._evaluator, self._say = model, config, evaluator, say
        self._store, self._repeat = store, repeat
        self._engine = ExitStack()
        self._running: LM | None = None
        self._lm: LM | None = None
        self.n_measured = 0

    def close(self) -> None:
        """End the engine, if it was started."""
        self._engine.close()

    def measure(self, documents: Documents) -> pd.DataFrame:
        """Return a measurement's rows of these documents, in the suite's order; see `Measurement`.

        Raises:
            StartError: the model cannot be started.
            MergetuneError: it cannot be scored; what was replied before is kept.
        """
        if self._lm is None:
            self._lm = self._made()
        self.n_measured += self._count_new(self._lm, documents)
        return self._evaluator.measure_documents(self._lm, documents).items

    def _made(self) -> LM:
        """Return the model as lm-eval sees it, between it and the engine the store if there is one."""
        if self._store is None or not isinstance(self.model, LocalModel):
            return self._started()
        name = _name(self.model.digest, self._config, self._repeat)
        return StoredLM(self._started, self.model.prompts(), self._store, name)

    def _count_new(self, lm: LM, documents: Documents) -> int:
        """Count the items for which something has to be asked that the store does not hold."""
        if not isinstance(lm, StoredLM):
            return sum(map(len, documents.values()))
        requests = self._evaluator.requests(lm, documents)
        items = [own for asked in requests.values() for own in asked.values()]
        return sum(not all(map(lm.knows, own)) for own in items)

    def _started(self) -> LM:
        if self._running is None:
            try:
                self._running = self._engine.enter_context(self.model.started(self._config, self._say))
            except MergetuneError as error:
                raise StartError(str(error)) from error
        return self._running


def _name(digest: str, config: EngineConfig, repeat: int) -> str:
    """Return the digest of a model together with what computes its replies."""
    library = installed_version() if config.kind == "vllm" else importlib.metadata.version("transformers")
    settings = config.model_dump(mode="json", exclude=_HARMLESS)
    text = json.dumps([digest, settings, library, importlib.metadata.version("torch"), repeat])
    return hashlib.sha256(text.encode()).hexdigest()
