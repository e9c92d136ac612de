"""The study file: what may be written shortly, and the engine's options for other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergetune.engines.engine import EngineChanges, EngineConfig
from mergetune.errors import MergetuneError
from mergetune.files.yaml_io import validate
from mergetune.results.config import StudyConfig, engine_options

STUDY = {"base": "b", "experts": {"a": "x"}, "search_space": "task_arithmetic", "suite": "s"}


def study(**changes: Any) -> StudyConfig:
    return validate(STUDY | changes, StudyConfig, "study.yaml")


@pytest.mark.parametrize(
    ("key", "kind"),
    [("engine", "vllm"), ("engine", "auto"), ("sampler", "TPESampler"), ("warm_start", "none")],
)
def test_a_kind_may_stand_alone(key: str, kind: str) -> None:
    assert getattr(study(**{key: kind}), key) == getattr(study(**{key: {"kind": kind}}), key)


@pytest.mark.parametrize("key", ["engine", "budget", "sampler", "warm_start", "training_data"])
def test_what_holds_pairs_may_be_left_empty(key: str) -> None:
    assert study(**{key: None}) == study()


@pytest.mark.parametrize("key", ["experts", "suite", "seed", "finalists"])
def test_other_keys_may_not_be_left_empty(key: str) -> None:
    with pytest.raises(MergetuneError, match=f"`{key}`: must be .*, but is empty"):
        study(**{key: None})


@pytest.mark.parametrize("name", ["base", "suite", "search_space"])
def test_an_expert_may_not_be_called_what_a_study_calls_something_else(name: str) -> None:
    with pytest.raises(MergetuneError, match=f"an expert cannot be called `{name}`"):
        study(experts={name: "x"})


def test_engine_names_a_kind_or_a_file_with_all_options(tmp_path: Path) -> None:
    assert engine_options("vllm", EngineChanges(batch_size=8)) == EngineConfig(kind="vllm", batch_size=8)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | {"engine": {"kind": "vllm", "tensor_parallel_size": 2}}))
    assert engine_options(str(file)) == EngineConfig(kind="vllm", tensor_parallel_size=2)
    file.write_text("engine: {kind: transformers, device: cuda:1, batch_size: 4}")
    assert engine_options(str(file)) == EngineConfig(kind="transformers", device="cuda:1", batch_size=4)
    assert engine_options(str(file), EngineChanges(batch_size=8)).batch_size == 8
    file.write_text("engine: transformers")
    assert engine_options(str(file)) == EngineConfig(kind="transformers")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engin: {kind: vllm}", r"engine\.yaml: `engine`: is required, but missing"),
        ("engine: {kind: transformers, seed: 1}", "`seed` is no option of `kind: transformers`"),
        ("engine: {batchsize: 3}", r"`engine\.batchsize`: unknown key\. Did you mean `batch_size`"),
        ("engine:", r"`engine`: must be `key: value` pairs \(kind, .*\), but is empty"),
    ],
)
def test_a_file_of_options_is_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "engine.yaml").write_text(text)
    with pytest.raises(MergetuneError, match=message):
        engine_options(str(tmp_path / "engine.yaml"))


def test_an_unknown_engine_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        MergetuneError, match=r"a YAML file with `engine`, but got `vlm`\. Did you mean `vllm`"
    ):
        engine_options("vlm")
