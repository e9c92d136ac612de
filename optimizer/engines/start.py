"""Choosing an engine and starting it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from optimizer.engines.choice import choose_engine
from optimizer.engines.engine import Engine, EngineConfig, EngineKind
from optimizer.errors import MergetuneError
from optimizer.merging.chat_template import ChatTemplate
from optimizer.merging.inputs import Inputs


def start_chosen(
    config: EngineConfig,
    model: Path,
    inputs: Inputs | None,
    folder: Path | None,
    begun_with: EngineKind | None,
    say: Callable[[str], None],
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
        folder: where its log is kept, and that it passed its self-test; without one there is no test.
        chat: takes the place of the model's chat template; where something is merged, `inputs.chat` does.

    Raises:
        MergetuneError: it cannot start, or does not compute with the weights that are put in.
    """
    if inputs is not None:
        chat = inputs.chat
    if config.kind == "transformers":
        from optimizer.engines.transformers_engine import TransformersEngine

        return TransformersEngine(config, model, inputs.merger if inputs else None, chat)
    from optimizer.engines.self_test import start_tested
    from optimizer.engines.vllm_engine import VllmEngine

    if inputs is not None and folder is not None:
        return start_tested(config, inputs, folder)
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs) / "engine.log"
        return VllmEngine(config, model, inputs.paths if inputs else None, log, chat)
