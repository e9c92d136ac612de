"""Prompts and decoding are the suite's alone: nothing is cut off, dropped or decoded otherwise in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GenerationConfig

from helpers import CHATML
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
SILENT = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)
# What could alter greedy replies, with a value that does, or would.
ALTERING: dict[str, Any] = {
    "num_beams": 3,
    "do_sample": True,
    "temperature": 2.0,
    "top_k": 2,
    "top_p": 0.3,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 5,
    "suppress_tokens": list(range(40, 200)),
    "begin_suppress_tokens": list(range(40, 300)),
    "forced_eos_token_id": 2,
    "bad_words_ids": [[token] for token in range(60, 160)],
    "exponential_decay_length_penalty": [1, 3.0],
    "renormalize_logits": True,
}


def copied(base: Path, folder: Path, template: str | None = None) -> Path:
    shutil.copytree(base, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def ask(
    folder: Path, model: Path, items: list[dict[str, Any]], task: dict[str, Any], **suite: Any
) -> list[str]:
    """Return the replies of a model to some items."""
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    tasks = [{"items": "items.jsonl", **task}]
    data = {"description": "x", "chat_template": True, "holdout": 0, "objectives": {"o": {"tasks": tasks}}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(data | suite))
    engine = TransformersEngine(EngineConfig(device="cpu", max_length=512), model)
    try:
        found = Evaluator(read_suite(folder / "suite.yaml")).measure(engine.lm, "search").items
    finally:
        engine.close()
    return list(found["response"])


SAY = {"scorer": "exact", "max_new_tokens": 8}
ITEMS = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(4)]


@pytest.mark.parametrize(
    ("template", "says"), [(NO_SYSTEM + CHATML, "not supported"), (SILENT, "leaves out")]
)
def test_a_system_message_that_the_template_does_not_take_is_refused(
    template: str, says: str, tiny_base: Path, tmp_path: Path
) -> None:
    model = copied(tiny_base, tmp_path / "model", template)
    task = {**SAY, "system": "Be brief."}
    with pytest.raises(MergetuneError, match=rf"{says}.*merge_into_user"):
        ask(tmp_path, model, ITEMS, task)
    merged = ask(tmp_path, model, ITEMS, task, system="merge_into_user")
    written = [{**item, "prompt": f"Be brief.\n\n{item['prompt']}"} for item in ITEMS]
    assert merged == ask(tmp_path, model, written, SAY)


def test_a_model_without_a_template_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    model = copied(tiny_base, tmp_path / "model")
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        path = model / file
        if file.endswith("jinja"):
            path.unlink(missing_ok=True)
        else:
            settings = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    with pytest.raises(MergetuneError, match="need a chat template"):
        ask(tmp_path, model, ITEMS, SAY)


@pytest.mark.parametrize("task", [SAY, {"scorer": "choice"}])
def test_a_prompt_that_does_not_fit_is_refused_before_any_work(
    task: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    items = [
        {"prompt": f"Rule {i}. " + "Words " * 300 * (i % 2), "answer": 0, "choices": ["a", "b"]}
        for i in range(6)
    ]
    if task is SAY:
        items = [{"prompt": item["prompt"], "answer": "x"} for item in items]
    with pytest.raises(MergetuneError, match=r"3 of 6 items of `o:items.jsonl` \(by up to \d+ tokens\)"):
        ask(tmp_path, tiny_base, items, task)
    assert len(ask(tmp_path, tiny_base, items, task, truncate="left")) == 6


@pytest.mark.parametrize("truncate", ["refuse", "left"])
def test_replies_must_leave_room_for_the_prompt(truncate: str, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(MergetuneError, match=r"max_new_tokens|must fit the model's length"):
        ask(tmp_path, tiny_base, ITEMS, {**SAY, "max_new_tokens": 1024}, truncate=truncate)


def test_replies_do_not_depend_on_the_models_generation_settings(tiny_base: Path, tmp_path: Path) -> None:
    expected = ask(tmp_path, tiny_base, ITEMS, SAY)
    settings_of: Any = GenerationConfig  # transformers gives it no types
    assert ALTERING.keys() <= settings_of().to_dict().keys()
    for number, (name, value) in enumerate(ALTERING.items()):
        model = copied(tiny_base, tmp_path / f"model{number}")
        path = model / "generation_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(settings | {name: value}))
        assert ask(tmp_path, model, ITEMS, SAY) == expected, name
