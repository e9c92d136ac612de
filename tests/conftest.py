"""Session fixtures: small real models. Tests that damage one work on a copy."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import build_llama, fine_tune, train_adapter
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.merging.inputs import Inputs, open_inputs

# A machine under load is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over all that was imported: engines call it as they end."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let all of it be freed, without which libraries of C++ speak of leaks as the process ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Leave the environment as it was: a cache that one test names is none of the next one's."""
    before = dict(os.environ)
    yield
    if (mode := os.environ.get("RAY_AUTH_MODE")) is not None:
        before["RAY_AUTH_MODE"] = mode  # which the process's Ray has taken up for good
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Begin on two threads of torch, and leave as many as there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a tokenizer and a chat template."""
    return build_llama(tmp_path_factory.mktemp("models") / "tiny-base")


@pytest.fixture(scope="session")
def tiny_experts(tiny_base: Path) -> dict[str, Path]:
    """Two full fine-tunes of `tiny_base`; the task vector of `b` is twice as long as `a`'s."""
    return {
        "a": fine_tune(tiny_base, tiny_base.parent / "tiny-expert-a", seed=1, std=0.002),
        "b": fine_tune(tiny_base, tiny_base.parent / "tiny-expert-b", seed=2, std=0.004),
    }


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tiny_experts: dict[str, Path]) -> Inputs:
    """The tiny models, open to be merged."""
    return open_inputs(tiny_base, tiny_experts)


@pytest.fixture(scope="module")
def engine(inputs: Inputs) -> Iterator[TransformersEngine]:
    """An engine of a module's own, for recipes of its `inputs`."""
    engine = TransformersEngine(EngineConfig(device="cpu"), inputs.base.folder, inputs.merger)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path) -> Path:
    """A LoRA adapter of `tiny_base` on attention and MLP."""
    return train_adapter(
        tiny_base,
        tiny_base.parent / "tiny-adapter",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, for `cache_model`; the Hub itself is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def tiny_tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama whose head is its embedding matrix."""
    return build_llama(tmp_path_factory.mktemp("models") / "tiny-tied", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_half(tiny_base: Path) -> dict[str, Path]:
    """The base and one fine-tune of it in float16, whose range is narrow."""
    folder = tiny_base.parent
    base = fine_tune(tiny_base, folder / "tiny-half-base", seed=5, std=0.0, dtype=torch.float16)
    return {"base": base, "a": fine_tune(base, folder / "tiny-half-a", seed=6, std=0.02)}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a Llama of four layers, and its fine-tunes `a`, `b` and `c`."""
    folder = tmp_path_factory.mktemp("importing")
    build_llama(folder / "base", num_hidden_layers=4)
    for seed, name in enumerate("abc", start=1):
        fine_tune(folder / "base", folder / name, seed=seed, std=0.002 * seed)
    return folder


@pytest.fixture(scope="session")
def half_model_folder(model_folder: Path) -> Path:
    """The same in bfloat16."""
    folder = model_folder.with_name("half")
    for name in ("base", "a", "b", "c"):
        fine_tune(model_folder / name, folder / name, seed=0, std=0.0, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def here(model_folder: Path) -> Iterator[Path]:
    """The folder of the models as the folder of this process, as mergekit is called beside them."""
    with contextlib.chdir(model_folder):
        yield model_folder
