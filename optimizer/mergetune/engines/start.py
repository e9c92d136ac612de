"""Choosing an engine and starting it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from mergetune.engines.choice import choose_engine
from mergetune.engines.engine import Engine, EngineConfig, EngineKind
from mergetune.errors import MergetuneError
from mergetune.files.library import cache_folder, writable
from mergetune.merging.inputs import Inputs
from mergetune.weights.chat_template import ChatTemplate

_SECONDS_KEPT = 30 * 24 * 3600.0


def start_chosen(
    config: EngineConfig,
    model: Path,
    inputs: Inputs | None,
    folder: Path | None,
    begun_with: EngineKind | None,
    say: Callable[[str], object],
    chat: ChatTemplate | None = None,
) -> tuple[Engine, EngineConfig]:
    """Choose an engine and start it; where `auto` chose one that does not run, start the other.

    See `choose_engine` and `start_engine`. `say` is told what was chosen and why; the configuration
    that comes back starts the same engine again.
    """
    settled, reason = choose_engine(config, model, begun_with)
    say(f"engine: {reason}")
    try:
        return start_engine(settled, model, inputs, folder, chat), settled
    except MergetuneError as error:
        if settled.kind == "transformers" or config.kind != "auto" or begun_with is not None:
            raise
        say(f"engine: transformers, since vLLM did not start: {error}")
        settled = settled.model_copy(update={"kind": "transformers"})
        return start_engine(settled, model, inputs, folder, chat), settled


def start_engine(
    config: EngineConfig,
    model: Path,
    inputs: Inputs | None = None,
    folder: Path | None = None,
    chat: ChatTemplate | None = None,
) -> Engine:
    """Start an engine of the kind that `config` names.

    Args:
        config: its options.
        model: the directory to start with: the base, or any model that is only to be scored.
        inputs: what is to be merged, if anything is.
        folder: where its log is kept, and that it passed its self-test; without one there is no test, and the
            log goes into the cache.
        chat: takes the place of the model's chat template; where something is merged, `inputs.chat` does.

    Raises:
        MergetuneError: it cannot start, or does not compute with the weights that are put in.
    """
    if inputs is not None:
        chat = inputs.chat
    if config.kind == "transformers":
        from mergetune.engines.transformers_engine import TransformersEngine

        return TransformersEngine(config, model, inputs.merger if inputs else None, chat)
    from mergetune.engines.self_test import start_tested
    from mergetune.engines.vllm_engine import VllmEngine

    if inputs is not None and folder is not None:
        return start_tested(config, inputs, folder)
    return VllmEngine(config, model, inputs.paths if inputs else None, _log(), chat)


def _log() -> Path:
    """Return a new log file in the cache; those of a month ago are removed."""
    folder = writable(cache_folder() / "logs", "--cache")
    now = time.time()
    for file in folder.glob("engine-*.log"):
        with contextlib.suppress(OSError):  # another process may be faster
            if now - file.stat().st_mtime > _SECONDS_KEPT:
                file.unlink()
    return folder / f"engine-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
