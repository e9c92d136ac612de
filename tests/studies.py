"""Small studies and suites on tiny models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mergetune.evaluation.suite import Suite, read_suite
from mergetune.study.loop import run_study


def write_study(folder: Path, base: Path, models: dict[str, Path], **changes: Any) -> Path:
    """Write a study with two objectives and a guard, of a second or two per run."""
    folder.mkdir(exist_ok=True)
    words = [{"prompt": f"Say {i}.", "patterns": [str(i % 10), "e", "a", "[A-Z]"]} for i in range(16)]
    parity = [{"prompt": f"Is {i} even?", "choices": ["Yes", "No"], "answer": i % 2} for i in range(16)]
    for name, items in (("words", words), ("parity", parity)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    choice = {"items": "parity.jsonl", "scorer": "choice"}
    suite = {
        "description": "test",
        "chat_template": True,
        "objectives": {
            "words": {"tasks": [{"items": "words.jsonl", "scorer": "regex", "max_new_tokens": 6}]},
            "parity": {"tasks": [choice]},
        },
        "guards": {"calm": {"margin": 0.5, "tasks": [choice | {"items": "./parity.jsonl"}]}},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    study = {
        "base": str(base),
        "experts": {name: str(path) for name, path in models.items()},
        "search_space": "task_arithmetic",
        "suite": "suite.yaml",
        "engine": {"kind": "transformers"},
        "budget": {"trials": 3},
        "allow_flat_objectives": True,  # of random models
        "warm_start": "none",
        **changes,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def run(study: Path, out: Path) -> str:
    """Run a study; returns what it printed."""
    printed = io.StringIO()
    run_study(study, out, Console(file=printed, width=200))
    return printed.getvalue()


def write_suite(folder: Path, answers: list[str], **changes: object) -> Suite:
    """Write a suite whose items are answered right by the model that these replies come from."""
    items = [{"prompt": f"Count to {i}.", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {"items": "items.jsonl", "scorer": "exact", "max_new_tokens": 4}
    data = {
        "description": "test",
        "chat_template": True,
        "holdout": 0,
        "objectives": {"counting": {"margin": 0.1, "tasks": [task]}},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(data | changes))
    return read_suite(folder / "suite.yaml")
