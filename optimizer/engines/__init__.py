"""Engines: living inference processes whose weights are swapped."""

from __future__ import annotations

from pathlib import Path

from optimizer.engines.engine import Engine, EngineConfig


def start_engine(config: EngineConfig, base: Path) -> Engine:
    """Start the engine that `config` names, with the base's weights and tokenizer."""
    from optimizer.engines.transformers_engine import TransformersEngine

    return TransformersEngine(config, base)


__all__ = ["Engine", "EngineConfig", "start_engine"]
