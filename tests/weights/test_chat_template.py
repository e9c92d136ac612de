"""Chat templates for bases that have none: an expert's or a file's, measured and written alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, GenerationConfig

from helpers import CHATML, build_llama, fine_tune
from mergetune.engines.engine import EngineConfig
from mergetune.engines.start import start_engine
from mergetune.errors import MergetuneError
from mergetune.evaluation.suite import read_suite
from mergetune.measuring.model_under_test import open_model
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.space.recipe import MergeRecipe
from mergetune.study.export import write_merged

END, TEXT_END = "<|im_end|>", "<|endoftext|>"
OTHER = CHATML.replace("<|im_start|>", "<|endoftext|>")
TOOLS = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CHATML + "{# tools #}"}]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_template(folder: Path) -> Path:
    """Make a model a pretrained one: no template, and another token ends a text."""
    (folder / "chat_template.jinja").unlink()
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, eos_token_id=0)
    edit_json(folder / "tokenizer_config.json", eos_token=TEXT_END)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A pretrained base and two chat fine-tunes of it."""
    base = build_llama(tmp_path / "base")
    experts = {name: fine_tune(base, tmp_path / name, seed, 0.2) for seed, name in enumerate("ab", 1)}
    return {"base": without_template(base), **experts}


def opened(models: dict[str, Path]) -> Inputs:
    return open_inputs(models["base"], {name: models[name] for name in "ab"})


def average(inputs: Inputs) -> MergeRecipe:
    lambdas = dict.fromkeys(inputs.expert_sources, 0.5)
    return MergeRecipe.of_one_group(
        "task_arithmetic", inputs.base_source, inputs.expert_sources, {"lambda": lambdas}
    )


def write_suite(folder: Path, chat_template: bool | str) -> Path:
    task = {"items": "items.jsonl", "scorer": "contains", "max_new_tokens": 4}
    (folder / "items.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{i}?", "answer": "e"}) for i in "ab")
    )
    suite = {
        "description": "x",
        "chat_template": chat_template,
        "holdout": 0,
        "objectives": {"o": {"tasks": [task]}},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml"


def test_a_merge_is_served_with_the_template_and_ends_that_it_was_measured_with(
    models: dict[str, Path], tmp_path: Path
) -> None:
    inputs = opened(models).with_chat(True)
    assert any("takes that of `a` and `b`" in warning for warning in inputs.warnings)
    write_merged(tmp_path / "best", average(inputs), inputs)
    best: Any = AutoTokenizer.from_pretrained(tmp_path / "best")
    kind: Any = GenerationConfig
    ends = [best.convert_tokens_to_ids(END), best.convert_tokens_to_ids(TEXT_END)]
    assert (best.chat_template, best.eos_token) == (CHATML, END)
    assert kind.from_pretrained(tmp_path / "best").eos_token_id == ends
    question = [{"role": "user", "content": "One two?"}]
    measured = start_engine(EngineConfig(kind="transformers", device="cpu"), models["base"], inputs).lm
    served = start_engine(EngineConfig(kind="transformers", device="cpu"), tmp_path / "best").lm
    for lm in (measured, served):
        assert lm.apply_chat_template(question) == best.apply_chat_template(
            question, tokenize=False, add_generation_prompt=True
        )
        assert set(lm.end_tokens) == set(ends)
        assert lm.eot_token_id == ends[0]


def test_named_templates_are_taken_as_they_are(models: dict[str, Path], tmp_path: Path) -> None:
    for name in "ab":
        (models[name] / "chat_template.jinja").unlink()
        edit_json(models[name] / "tokenizer_config.json", chat_template=TOOLS)
    inputs = opened(models).with_chat(True)
    write_merged(tmp_path / "best", average(inputs), inputs)
    best: Any = AutoTokenizer.from_pretrained(tmp_path / "best")
    assert best.chat_template == {each["name"]: each["template"] for each in TOOLS}


def test_experts_that_disagree_are_named_and_a_file_chooses(models: dict[str, Path], tmp_path: Path) -> None:
    (models["b"] / "chat_template.jinja").write_text(OTHER)
    inputs = opened(models)
    assert any("those of `a` and `b` differ" in warning for warning in inputs.warnings)
    assert inputs.with_chat(False).chat is None
    with pytest.raises(MergetuneError, match=r"different ones: a, b\. Choose one.*chat_template: "):
        inputs.with_chat(True)
    chosen = read_suite(write_suite(tmp_path, "b/chat_template.jinja")).config.chat_template
    assert chosen == OTHER
    write_merged(tmp_path / "best", average(inputs), inputs.with_chat(chosen))
    best: Any = AutoTokenizer.from_pretrained(tmp_path / "best")
    assert (best.chat_template, best.eos_token) == (OTHER, END)


def test_a_file_takes_the_place_of_the_models_own(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "deploy.jinja").write_text(OTHER)
    suite = read_suite(write_suite(tmp_path, "deploy.jinja"))
    plain, given = open_model(str(models["a"])), open_model(str(models["a"]), chat=suite.config.chat_template)
    assert plain.digest != given.digest
    engine, _ = given.start(EngineConfig(kind="transformers", device="cpu"), None, None, print)
    prompt = engine.lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    engine.close()
    assert prompt.startswith(TEXT_END)
    changed = suite.digest
    (tmp_path / "deploy.jinja").write_text(CHATML)
    assert read_suite(tmp_path / "suite.yaml").digest != changed


@pytest.mark.parametrize("missing", ["models", "file", "broken"])
def test_without_a_template_conversations_are_refused_before_any_work(
    missing: str, models: dict[str, Path], tmp_path: Path
) -> None:
    for name in "ab":
        (models[name] / "chat_template.jinja").unlink()
    if missing == "models":
        for refused in (
            lambda: opened(models).with_chat(True),
            lambda: open_model(str(models["a"]), chat=True),
        ):
            with pytest.raises(MergetuneError, match=r"has no chat template.*FILE\.jinja"):
                refused()
    elif missing == "file":
        with pytest.raises(MergetuneError, match=r"deploy\.jinja: cannot be read"):
            read_suite(write_suite(tmp_path, "deploy.jinja"))
    else:
        with pytest.raises(MergetuneError, match="cannot write a question and a reply"):
            opened(models).with_chat("{% for %}")


def test_an_end_that_the_base_lacks_is_warned_of(tmp_path: Path) -> None:
    base = without_template(build_llama(tmp_path / "base"))
    expert = fine_tune(base, tmp_path / "a", 1, 0.01)
    (expert / "chat_template.jinja").write_text(CHATML.replace(END, "<|stop|>").replace("im_start", "turn"))
    tokenizer: Any = AutoTokenizer.from_pretrained(expert)
    tokenizer.add_tokens(["<|stop|>"], special_tokens=True)
    tokenizer.eos_token = "<|stop|>"
    tokenizer.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "saved" / name, expert / name)
    inputs = open_inputs(base, {"a": expert}, "base")
    assert any("lacks the token that ends its messages" in warning for warning in inputs.warnings)
    assert inputs.chat is not None
    assert inputs.chat.ends == ()
