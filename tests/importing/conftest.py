"""Four small models in one folder, by the names that the configurations of these tests use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import build_llama, fine_tune


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a Llama of four layers, and its fine-tunes `a`, `b` and `c`."""
    folder = tmp_path_factory.mktemp("importing")
    build_llama(folder / "base", num_hidden_layers=4)
    for seed, name in enumerate("abc", start=1):
        fine_tune(folder / "base", folder / name, seed=seed, std=0.002 * seed)
    return folder


@pytest.fixture(scope="session")
def half_models(models: Path) -> Path:
    """The same in bfloat16."""
    folder = models.with_name("half")
    for name in ("base", "a", "b", "c"):
        fine_tune(models / name, folder / name, seed=0, std=0.0, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def here(models: Path) -> Iterator[Path]:
    """The folder of the models as the folder of this process, as mergekit is called beside them."""
    with contextlib.chdir(models):
        yield models
