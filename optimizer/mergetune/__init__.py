"""mergetune: evaluation-driven tuning of merge coefficients for language models.

What the command line does is here as functions: `run_study`, `read_run`, `read_suite`, `read_items`,
`preview_items`, `join_items`, `evaluate`, `check`, `check_measurements`, `rescore`, `import_config`,
`merge`, `merge_as_adapter` and `inspect`.
Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergetune.api import (
        Inspection,
        ModelOptions,
        check,
        check_measurements,
        evaluate,
        import_config,
        inspect,
        join_items,
        merge,
        merge_as_adapter,
        preview_items,
        read_items,
        read_run,
        read_suite,
        rescore,
        run_study,
    )
    from mergetune.errors import MergetuneError
    from mergetune.results.run import Run

__version__ = "0.1.0"

_PLACES = {"MergetuneError": "mergetune.errors", "Run": "mergetune.results.run"}  # else mergetune.api

__all__ = [
    "Inspection",
    "MergetuneError",
    "ModelOptions",
    "Run",
    "check",
    "check_measurements",
    "evaluate",
    "import_config",
    "inspect",
    "join_items",
    "merge",
    "merge_as_adapter",
    "preview_items",
    "read_items",
    "read_run",
    "read_suite",
    "rescore",
    "run_study",
]

logging.getLogger("mergetune").addHandler(logging.NullHandler())  # as libraries do


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'mergetune' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES.get(name, "mergetune.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
