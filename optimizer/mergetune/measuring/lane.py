"""A lane of the pool: one engine, and what was merged into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergetune.engines.engine import Engine, EngineConfig
from mergetune.errors import MergetuneError, StartError
from mergetune.machine import clock
from mergetune.machine.memory import free_memory
from mergetune.space.recipe import MergeRecipe

if TYPE_CHECKING:
    from lm_eval.api.model import LM

# Starts an engine; returns it and the configuration that starts the same again. `say` is told which one runs.
Start = Callable[[EngineConfig, Callable[[str], object]], tuple[Engine, EngineConfig]]


@dataclass
class Loading:
    """What it took to get an engine ready, in seconds; `all_s` counts its start, too."""

    merge_s: float = 0.0
    load_s: float = 0.0
    all_s: float = 0.0


class Lane:
    """An engine that starts when it is first needed; it can be closed at any time and starts again.

    Args:
        start: starts it.
        config: how to start it.
        say: is told which engine runs.
        at_work: is told what is being done.
    """

    def __init__(
        self,
        start: Start,
        config: EngineConfig,
        say: Callable[[str], object] = lambda _: None,
        at_work: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.config = config
        self.engine: Engine | None = None
        self._start, self._say, self._at_work = start, say, at_work
        self._loaded: str | None = None  # the digest of the recipe in the engine
        self._was_started = False

    @property
    def host(self) -> str:
        """The machine of the worker that the engine is in; empty for an engine in this process."""
        return getattr(self.engine, "host", "")

    def living(self) -> Engine:
        """Return the engine, started if it is not there.

        Raises:
            StartError: it cannot be started for the first time.
            MergetuneError: it cannot be started again.
        """
        if self.engine is None:
            self._at_work(f"starting the engine{' again' if self._was_started else ''} …")
            free_memory()  # of an engine lent meanwhile: only now is an exception gone that may hold it
            say: Callable[[str], object] = (lambda _: None) if self._was_started else self._say
            try:
                self.engine, self.config = self._start(self.config, say)
            except MergetuneError as error:
                if self._was_started:
                    raise
                raise StartError(str(error)) from error
            self._was_started = True
        return self.engine

    def holds(self, recipe: MergeRecipe | None) -> bool:
        """Say whether an engine is there with a recipe merged into it."""
        return recipe is not None and self._loaded == recipe.digest

    def ready(self, recipe: MergeRecipe | None, loading: Loading) -> LM:
        """Return the model as lm-eval sees it, a recipe merged into it; the time that took is added."""
        began, engine = clock.seconds(), self.living()
        if recipe is not None and not self.holds(recipe):
            self._loaded = None
            took = engine.load(recipe)
            self._loaded = recipe.digest
            loading.merge_s += took.merge_s
            loading.load_s += took.load_s
        loading.all_s += clock.seconds() - began
        return engine.lm

    def forget_loaded(self) -> None:
        """Merge the next recipe anew, whichever it is: somebody put other weights in."""
        self._loaded = None

    def close(self) -> None:
        """End the engine; it starts again when it is needed."""
        if self.engine is not None:
            self.engine.close()
        self.engine, self._loaded = None, None
