"""Starting the engine that was chosen."""

from __future__ import annotations

import tempfile
from pathlib import Path

from optimizer.engines.engine import Engine, EngineConfig
from optimizer.merging.inputs import Inputs


def start_engine(
    config: EngineConfig, model: Path, inputs: Inputs | None = None, folder: Path | None = None
) -> Engine:
    """Start the engine that `choose_engine` settled on.

    Args:
        config: its options.
        model: the directory to start with: the base, or any model that is only to be scored.
        inputs: what is to be merged, if anything is.
        folder: where its log is kept, and that it passed its self-test; without one there is no test.

    Raises:
        MergetuneError: it cannot start, or does not compute with the weights that are put in.
    """
    if config.kind == "transformers":
        from optimizer.engines.transformers_engine import TransformersEngine

        return TransformersEngine(config, model, inputs.merger if inputs else None)
    from optimizer.engines.self_test import start_tested
    from optimizer.engines.vllm_engine import VllmEngine

    if inputs is not None and folder is not None:
        return start_tested(config, inputs, folder)
    with tempfile.TemporaryDirectory() as logs:
        return VllmEngine(config, model, inputs.paths if inputs else None, Path(logs) / "engine.log")
