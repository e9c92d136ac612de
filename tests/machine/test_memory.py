"""Where memory is too small: smaller batches, then a message that says what is needed; nothing stays held."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import plain_loop
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.weight_facts import WeightFacts
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.machine import memory
from mergetune.machine.memory import check_room, in_smaller_batches, is_out_of_memory
from mergetune.measuring import model_under_test
from mergetune.results.run_dir import RunDir
from mergetune.study import warm_start
from mergetune.study.loop import run_study
from studies import write_study

PROMPTS = [f"Count from {i} on:" for i in range(11)]


@pytest.fixture
def engine(tiny_base: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(EngineConfig(device="cpu", batch_size=8), tiny_base)
    yield engine
    engine.close()


def evaluator(folder: Path) -> Evaluator:
    lines = "\n".join(f'{{"prompt": "{prompt}", "answer": "1"}}' for prompt in PROMPTS)
    (folder / "say.jsonl").write_text(lines)
    (folder / "suite.yaml").write_text(
        "description: x\nchat_template: false\nholdout: 0\n"
        "objectives: {say: {tasks: [{items: say.jsonl, scorer: exact, max_new_tokens: 4}]}}\n"
    )
    return Evaluator(read_suite(folder / "suite.yaml"))


def with_room_for(engine: TransformersEngine, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the model run out of memory on more than so many texts at a time; returns the sizes tried."""
    sizes: list[int] = []
    forward = engine.model.forward

    def limited(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", limited)
    return sizes


def test_batches_that_do_not_fit_are_halved(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, _ = plain_loop(engine.model, engine.lm.tokenizer, PROMPTS, [" a", " b c"], 4)
    sizes = with_room_for(engine, 3, monkeypatch)
    found = evaluator(tmp_path).measure(engine.lm, "search").items
    assert found["response"].tolist() == said
    assert [size for size in dict.fromkeys(sizes) if size > 3] == [8, 4]


def test_a_single_prompt_that_does_not_fit_says_what_it_takes(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room_for(engine, 0, monkeypatch)
    with pytest.raises(TrialError, match=r"too small for a single prompt of \d+ tokens .*Tried to allocate"):
        evaluator(tmp_path).measure(engine.lm, "search")


def test_work_is_done_again_in_smaller_batches() -> None:
    tried: list[int] = []
    said: list[str] = []

    def work(n_tokens: int) -> str:
        tried.append(n_tokens)
        if n_tokens > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return "done"

    assert in_smaller_batches(work, said.append) == "done"
    assert tried == [1024, 256, 1]
    assert len(said) == 2

    def never(_n_tokens: int) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MergetuneError, match=r"too small for one text at a time .*the model, its largest"):
        in_smaller_batches(never, said.append)
    with pytest.raises(ZeroDivisionError):
        in_smaller_batches(lambda n: str(n / 0), said.append)
    assert not is_out_of_memory(RuntimeError("another one"))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(MergetuneError, match=r"weights alone need .* GiB of memory, but 0\.0 GiB are free"):
        TransformersEngine(EngineConfig(device="cpu"), tiny_base)
    check_room("a model", 1000, "cpu")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_dtype_that_is_stored_whatever_the_config_says(
    stored: torch.dtype, tiny_base: Path, tmp_path: Path
) -> None:
    for file in tiny_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: weight.to(stored) for name, weight in weights.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"').replace('"bfloat16"', '"float16"'))
    facts = WeightFacts.read(tmp_path, "auto")
    assert facts.dtype == str(stored).removeprefix("torch.")
    assert facts.nbytes == sum(weight.numel() for weight in weights.values()) * stored.itemsize
    assert WeightFacts.read(tmp_path, "float32").nbytes == facts.nbytes * 4 // stored.itemsize
    engine = TransformersEngine(EngineConfig(device="cpu"), tmp_path)
    assert engine.model.dtype == stored
    engine.close()


def test_after_slopes_that_do_not_fit_the_study_goes_on_and_nothing_of_them_is_held(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is started anew, as vLLM is after slopes: by then no model of theirs is alive."""
    study = write_study(tmp_path / "study", tiny_base, tiny_experts, warm_start="auto", budget={"trials": 1})
    lent: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def exhausted(engine: TransformersEngine, *_: Any) -> None:
        lent.append(weakref.ref(engine.model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Other(TransformersEngine):
        """An engine that makes room for slopes."""

    def start(config: EngineConfig, *rest: Any) -> tuple[TransformersEngine, EngineConfig]:
        gc.collect()
        alive.append(sum(ref() is not None for ref in lent))
        base, inputs, *_ = rest
        return Other(config, base, inputs.merger, inputs.chat), config

    monkeypatch.setattr(warm_start, "learn_laws", exhausted)
    monkeypatch.setattr(model_under_test, "start_chosen", start)
    is_lent = "mergetune.engines.transformers_engine.TransformersEngine"
    monkeypatch.setattr(is_lent, type("TransformersEngine", (TransformersEngine,), {}))
    printed = io.StringIO()
    run_study(study, tmp_path / "run", Console(file=printed, width=400))
    assert len(lent) == 3  # each with smaller batches
    assert len(alive) > 1
    assert not any(alive)
    assert "Memory is too small for one text at a time" in printed.getvalue()
    assert {c.is_baseline for c in RunDir(tmp_path / "run").candidates()} == {True, False}
