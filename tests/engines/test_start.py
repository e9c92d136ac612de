"""Which engine runs, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mergetune.engines.choice import choose_engine
from mergetune.engines.engine import EngineConfig
from mergetune.engines.start import start_chosen
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.vllm_arguments import environment_of
from mergetune.errors import MergetuneError
from mergetune.files.library import find
from mergetune.files.yaml_io import validate
from mergetune.weights.models import find_model

pytest.importorskip("vllm")


def test_auto_takes_vllm_where_it_is_installed(tiny_base: Path) -> None:
    config, reason = choose_engine(EngineConfig(batch_size=8), tiny_base)
    assert (config.kind, config.batch_size) == ("vllm", 8)
    assert reason.startswith("vLLM 0.")
    assert "which is installed" in reason


def test_auto_says_why_it_does_not_take_vllm(tmp_path: Path, tiny_base: Path) -> None:
    config, reason = choose_engine(EngineConfig(device="cuda:1"), tiny_base)
    assert (config.kind, "`engine.device` is cuda:1" in reason) == ("transformers", True)
    model = shutil.copytree(tiny_base, tmp_path / "model")
    data = json.loads((model / "config.json").read_text()) | {"architectures": ["MyForCausalLM"]}
    (model / "config.json").write_text(json.dumps(data))
    config, reason = choose_engine(EngineConfig(), model)
    assert (config.kind, "does not know the architecture MyForCausalLM" in reason) == ("transformers", True)


def test_a_study_goes_on_with_the_engine_that_it_was_begun_with(tiny_base: Path) -> None:
    config, reason = choose_engine(EngineConfig(), tiny_base, begun_with="transformers")
    assert (config.kind, reason) == ("transformers", "transformers, as the study was begun")


def test_auto_takes_transformers_where_vllm_starts_but_cannot_compute(tiny_base: Path) -> None:
    said: list[str] = []  # vLLM's attention takes no heads of 8 on a CPU
    engine, config = start_chosen(EngineConfig(), tiny_base, None, None, None, said.append)
    assert isinstance(engine, TransformersEngine)
    assert config.kind == "transformers"
    assert "engine: transformers, since vLLM did not start" in said[1]
    assert "head_dim=8" in said[1]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "transformers", "gpu_memory_utilization": 0.5}, "no option of `kind: transformers`"),
        ({"server": {"port": 8000}}, "`server`: unknown key"),
        ({"gpu_memory_utilization": 1.5}, "less than or equal to 1"),
    ],
)
def test_options_that_do_not_belong_are_refused(engine: dict[str, object], message: str) -> None:
    with pytest.raises(MergetuneError, match=message):
        validate(engine, EngineConfig, "study.yaml")


def test_vllm_sees_the_one_gpu_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in environment_of("auto")
    assert environment_of("cuda:1")["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7f")
    assert environment_of("cuda:1")["CUDA_VISIBLE_DEVICES"] == "GPU-7f"


def test_the_users_home_may_be_written_short(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_base.parent))
    assert find_model(f"~/{tiny_base.name}", Path("/elsewhere")) == tiny_base.resolve()
    (tiny_base.parent / "one.yaml").write_text("")
    assert find("evals", "~/one.yaml", Path("/elsewhere")) == (tiny_base.parent / "one.yaml").resolve()
