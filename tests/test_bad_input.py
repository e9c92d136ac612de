"""Whatever is wrong with a file that a user brings: exit code 3, one message, no traceback, nothing lost.

Each case changes one thing of a set of files with which the command works.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from helpers import fine_tune
from mergetune.cli import EXIT_ERROR, main

SPACE: dict[str, Any] = {
    "description": "test",
    "method": "task_arithmetic",
    "lambda": {"low": 0.0, "high": 1.0},
    "groups": [{"name": "all"}],
}
SUITE: dict[str, Any] = {
    "description": "test",
    "chat_template": True,
    "holdout": 0,
    "objectives": {"say": {"tasks": [{"items": "items.jsonl", "scorer": "contains", "max_new_tokens": 2}]}},
}
ITEMS = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(6)]
STUDY: dict[str, Any] = {
    "base": "base",
    "experts": {"a": "full", "b": "adapter"},
    "search_space": "space.yaml",
    "suite": "suite.yaml",
    "engine": {"kind": "transformers", "device": "cpu"},
    "budget": {"trials": 1},
    "sampler": "RandomSampler",
    "warm_start": "none",
    "allow_flat_objectives": True,
}
RUN = ("run", "study.yaml", "--out", "run")
EVAL = ("eval", "base", "--suite", "suite.yaml", "--engine", "transformers")
MERGE = ("merge", "recipe.yaml", "merged")
INSPECT = ("inspect", "base", "full", "adapter")
COMPARE = ("check", "--from", "one.parquet", "--from", "two.parquet", "--suite", "suite.yaml")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_adapter: Path) -> Path:
    """A folder with everything that the commands need, and two measurements."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(tiny_base, folder / "base")
    shutil.copytree(tiny_adapter, folder / "adapter")
    fine_tune(tiny_base, folder / "full", seed=1, std=0.002)
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    recipe = {
        "method": "task_arithmetic",
        "base": {"path": "base"},
        "experts": {"a": {"path": "full"}},
        "groups": [{"name": "all", "lambda": {"a": 0.5}}],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@dataclass(frozen=True)
class Ended:
    code: Any
    said: str
    printed: str


@pytest.fixture
def place(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace, the working directory."""
    folder = tmp_path / "here"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MERGETUNE_CACHE", raising=False)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Calls the command line in this process."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mergetune", *arguments])
        capfd.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        out, err = capfd.readouterr()
        return Ended(code, err, out)

    return call


def check(ended: Ended) -> str:
    """Check that a command ended with one message; returns it."""
    assert ended.code == EXIT_ERROR, ended.said + ended.printed
    assert "Traceback" not in ended.said + ended.printed
    messages = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, ended.said
    assert len(messages[0]) > 25, "says the rule, the value and the remedy"
    return messages[0]


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Return a change that puts other content into a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def data(name: str, **changes: Any) -> Callable[[Path], object]:
    """Return a change of keys of a YAML or JSON file; `...` takes one away."""

    def change(folder: Path) -> None:
        file = folder / name
        known = yaml.safe_load(file.read_text())
        merged = {key: value for key, value in {**known, **changes}.items() if value is not ...}
        file.write_text(json.dumps(merged))

    return change


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def folder_instead(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def cut(name: str, n_bytes: int) -> Callable[[Path], object]:
    """Return a change that leaves so many bytes of a file, counted from its end where negative."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:n_bytes])


def link(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / "nowhere" / "at-all")

    return change


BROKEN_YAML: list[str | bytes] = [
    "",
    "null",
    "- a",
    "3",
    "a: [",
    "a:\n\tb: 1",
    "&a [*a]",
    "{" * 3000,
    b"\xff\xfe\x00a",
    b"\x80abc",
    "!!python/object:os.system {}",
    "a: 2024-99-99",
]
STUDY_CHANGES: list[dict[str, Any]] = [
    {"base": ...},
    {"base": 3},
    {"base": None},
    {"base": "nowhere"},
    {"base": "space.yaml"},
    {"experts": ...},
    {"experts": []},
    {"experts": {}},
    {"experts": {"a": None}},
    {"experts": {"a": "nowhere"}},
    {"experts": {"base": "full"}},
    {"experts": {"a/b": "full"}},
    {"budget": 3},
    {"budget": {"trials": -1}},
    {"budget": {"hours": "x"}},
    {"sampler": 5},
    {"sampler": "NoSampler"},
    {"sampler": {"kind": "TPESampler", "no_option": 1}},
    {"warm_start": "x"},
    {"engine": {"kind": "x"}},
    {"engine": 7},
    {"engine": {"kind": "transformers", "device": "moon"}},
    {"engine": {"kind": "transformers", "max_length": 10**7}},
    {"search_space": "nowhere.yaml"},
    {"search_space": "no_preset"},
    {"suite": "nowhere.yaml"},
    {"suite": None},
    {"vocabulary": "x"},
    {"training_data": {"a": "nowhere.jsonl"}},
    {"training_data": {"x": "items.jsonl"}},
    {"export": "x"},
    {"deploy": "int8"},
    {"deploy": {"quantize": "int2"}},
    {"deploy": {"quantize": "int8", "python": "nowhere"}},
    {"export": "adapter"},  # one expert is a full fine-tune
    {"export": {"adapter": {"rank": 0}}},
    {"finalists": 0},
    {"seed": -1},
    {"unknown": 1},
    {"cache": "study.yaml/x"},
]
TASK = SUITE["objectives"]["say"]["tasks"][0]


def tasks(*given: Any, **more: Any) -> dict[str, Any]:
    return {"objectives": {"say": {"tasks": list(given), **more}}}


SUITE_CHANGES: list[dict[str, Any]] = [
    {"objectives": None},
    {"objectives": {}},
    {"objectives": {"say": {}}},
    {"objectives": []},
    tasks(),
    tasks({}),
    tasks({**TASK, "items": "nowhere.jsonl"}),
    tasks({**TASK, "items": "base"}),
    tasks({**TASK, "scorer": "x"}),
    tasks({**TASK, "scorer": {"kind": "regex", "patterns": ["("]}}),
    tasks({**TASK, "max_new_tokens": 0}),
    tasks({**TASK, "max_new_tokens": 10**6}),
    tasks({**TASK, "limit": 0}),
    tasks({**TASK, "limit": 1}),
    tasks({**TASK, "lm_eval": "arc_easy"}),
    tasks({"lm_eval": "no_such_task"}),
    tasks({**TASK, "fewshot_items": "items.jsonl", "num_fewshot": 99}),
    tasks(TASK, TASK),
    tasks(TASK, weight=-1),
    tasks(TASK, direction="up"),
    {"chat_template": "nowhere.jinja"},
    {"chat_template": "broken.jinja"},
    {"chat_template": 3},
    {"holdout": 2},
    {"holdout": 0.999},
    {"include_path": "nowhere", **tasks({"lm_eval": "own"})},
    {"guards": {"g": {"tasks": [TASK], "margin": "x"}}},
    {"guards": {"say": {"tasks": [TASK]}}},
    {"truncate": "right"},
    {"system": "x"},
]
LINE = json.dumps(ITEMS[0])
BROKEN_ITEMS: list[str | bytes] = [
    "",
    "\n\n",
    "x",
    "3",
    "[]",
    "[1]",
    '["a"]',
    "{}",
    '{"prompt": 3, "answer": "a"}',
    '{"prompt": "", "answer": "a"}',
    '{"prompt": "a"}',
    '{"prompt": "a", "answer": null}',
    '{"prompt": "a", "answer": ""}',
    '{"prompt": "a", "answer": NaN}',
    '{"prompt": "a", "answer": "\\ud83d"}',
    '{"prompt": "a", "answer": {}}',
    f"{LINE}\n{LINE[:-4]}",
    b"\xff\xfe\x00",
    b"\x1f\x8b\x08",
    b"PAR1",
    "prompt,answer\na,b",
    '{"messages": []}',
    '{"prompt": "a", "answer": "b", "system": 3}',
    '{"prompt": "a", "answer": ' + "[" * 5000 + "]" * 5000 + "}",
    "<html>",
    '{"prompt": "a", "answer": ' + "1" * 5000 + "}",
]
RECIPE_CHANGES: list[dict[str, Any]] = [
    {"method": "no_method"},
    {"method": None},
    {"base": ...},
    {"base": {"path": "nowhere"}},
    {"experts": {}},
    {"experts": {"a": {"path": "nowhere"}}},
    {"groups": []},
    {"groups": [{"name": "all", "lambda": {"x": 1}}]},
    {"groups": [{"name": "all", "lambda": {"a": "x"}}]},
    {"groups": [{"name": "all", "density": {"a": 1}}]},
    {"groups": [{"name": "one", "layers": [0, 0], "lambda": {"a": 1}}]},
    {"groups": [{"name": "all", "match": "(", "lambda": {"a": 1}}]},
    {"groups": [{"name": "all", "lambda": {"a": 1e300}}]},
    {"base": {"path": "base", "digest": "0" * 64}},
    {"extra": 1},
]
SPACE_CHANGES: list[dict[str, Any]] = [
    {"method": "no_method"},
    {"method": 3},
    {"lambda": {"low": 1, "high": 0}},
    {"lambda": "x"},
    {"lambda": {"low": 0, "high": float("inf")}},
    {"groups": []},
    {"groups": [{"name": "all"}, {"name": "all"}]},
    {"groups": [{"name": "one", "layers": "0-9"}]},
    {"groups": [{"name": "one", "match": "nothing_like_it"}]},
    {"groups": [{"name": "one", "match": "("}]},
    {"density": {"low": 0, "high": 1}},
    {"description": ...},
]
ADAPTER_CHANGES: list[dict[str, Any]] = [
    {"peft_type": "IA3"},
    {"peft_type": ...},
    {"lora_alpha": None},
    {"lora_alpha": "x"},
    {"alpha_pattern": {"q_proj": None}},
    {"init_lora_weights": "pissa"},
    {"layer_replication": [[0, 2]]},
]
CONFIG_CHANGES: list[dict[str, Any]] = [
    {"architectures": None},
    {"architectures": ["NoSuchModel"]},
    {"model_type": "no_such_type"},
    {"model_type": ...},
    {"hidden_size": "x"},
    {"hidden_size": 7},
    {"num_hidden_layers": 5},
    {"vocab_size": -1},
    {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"},
    },
]
CASES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {}
for number, content in enumerate(BROKEN_YAML):
    for file, command in (
        ("study.yaml", RUN),
        ("suite.yaml", EVAL),
        ("space.yaml", RUN),
        ("recipe.yaml", MERGE),
    ):
        CASES[f"yaml {number} as {file}"] = text(file, content), command
for file, command, changes in (
    ("study.yaml", RUN, STUDY_CHANGES),
    ("suite.yaml", EVAL, SUITE_CHANGES),
    ("space.yaml", RUN, SPACE_CHANGES),
    ("recipe.yaml", MERGE, RECIPE_CHANGES),
    ("adapter/adapter_config.json", INSPECT, ADAPTER_CHANGES),
    ("base/config.json", EVAL, CONFIG_CHANGES),
):
    for number, change in enumerate(changes):
        CASES[f"{file} {number} {str(change)[:60]}"] = data(file, **change), command
for number, content in enumerate(BROKEN_ITEMS):
    CASES[f"items {number}"] = text("items.jsonl", content), EVAL
JSON_FILES = (
    "base/config.json",
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "base/generation_config.json",
)
BROKEN_JSON: list[str | bytes] = ["", "null", "[]", '{"a": ', b"\xff", '"x"']
for file in (*JSON_FILES, "full/config.json", "adapter/adapter_config.json"):
    for number, content in enumerate(BROKEN_JSON):
        if (file, content) != ("base/generation_config.json", "null"):
            CASES[f"{file} {number}"] = text(file, content), RUN
for file in ("study.yaml", "suite.yaml", "space.yaml", "items.jsonl"):
    CASES[f"no {file}"] = gone(file), RUN
    CASES[f"a folder as {file}"] = folder_instead(file), RUN
    CASES[f"a dangling {file}"] = link(file), RUN
for file in (
    "base/config.json",
    "base/model.safetensors",
    "full/model.safetensors",
    "full/config.json",
    "adapter/adapter_model.safetensors",
    "base/tokenizer.json",
):
    CASES[f"no {file}"] = gone(file), RUN
for file in ("base/model.safetensors", "full/model.safetensors", "adapter/adapter_model.safetensors"):
    for n_bytes in (0, 4, 100, -1, -1000):
        CASES[f"{n_bytes} bytes of {file}"] = cut(file, n_bytes), RUN
    CASES[f"no weights in {file}"] = text(file, b"not safetensors at all"), RUN
CASES |= {
    f"index {number}": (text("base/model.safetensors.index.json", content), EVAL)
    for number, content in enumerate(
        [
            '{"weight_map": null}',
            '{"weight_map": []}',
            "{}",
            "[]",
            "x",
            '{"weight_map": {"a": 3}}',
            '{"weight_map": {"a": "nowhere.safetensors"}}',
            '{"weight_map": {"a": "../items.jsonl"}}',
            '{"weight_map": {"model.norm.weight": null}}',
        ]
    )
}
CASES |= {
    "out is a folder": (lambda folder: (folder / "out.parquet").mkdir(), (*EVAL, "--out", "out.parquet")),
    "out is below a file": (lambda folder: None, (*EVAL, "--out", "items.jsonl/out.parquet")),
    "merged into a file": (lambda folder: None, ("merge", "recipe.yaml", "items.jsonl")),
    "merged into its base": (lambda folder: None, ("merge", "recipe.yaml", "base")),
    "run into a file": (lambda folder: None, ("run", "study.yaml", "--out", "items.jsonl")),
    "no run": (lambda folder: None, ("report", "base")),
    "a cache that cannot be": (lambda folder: None, (*EVAL, "--cache", "items.jsonl/cache")),
    "an engine file of another kind": (lambda folder: None, (*EVAL[:-1], "suite.yaml")),
    "a chart of another kind": (lambda folder: None, (*INSPECT, "--chart", "chart.xyz")),
}


@pytest.mark.parametrize("command", [RUN, EVAL, MERGE, INSPECT], ids=lambda command: command[0])
def test_unchanged_it_works(command: tuple[str, ...], place: Path, call: Callable[..., Ended]) -> None:
    ended = call(*command)
    assert ended.code == 0, ended.said


def test_a_dangling_link_is_written_over(place: Path, call: Callable[..., Ended]) -> None:
    link("out.parquet")(place)
    assert call(*EVAL, "--out", "out.parquet").code == 0
    assert len(pd.read_parquet(place / "out.parquet")) == len(ITEMS)


@pytest.mark.parametrize("name", CASES)
def test_it_ends_with_one_message(name: str, place: Path, call: Callable[..., Ended]) -> None:
    change, command = CASES[name]
    (place / "broken.jinja").write_text("{% if %}")
    if name.startswith("index"):
        (place / "base" / "model.safetensors").unlink()
    change(place)
    check(call(*command))


MEASURED = pd.DataFrame(
    {
        "score_name": "say",
        "task": "say:items.jsonl",
        "item": [f"{i}" for i in range(6)],
        "score": 1.0,
        "response": "a",
        "aggregation": "mean",
        "parts": None,
        "rules": "x",
    }
)


@pytest.mark.parametrize(
    "frame",
    [
        MEASURED.drop(columns="item"),
        MEASURED.assign(score="x"),
        MEASURED.assign(item=3),
        MEASURED.iloc[:0],
        MEASURED.assign(item="same"),
        MEASURED.assign(score_name="other"),
        MEASURED,
        MEASURED.assign(parts=pd.Series([[1.0]] * 6)),
        MEASURED.assign(aggregation="no such", parts=pd.Series([[1.0, 2.0]] * 6)),
        b"no parquet",
        b"",
    ],
    ids=range(11),
)
def test_a_measurement_that_is_none_ends_with_one_message(
    frame: pd.DataFrame | bytes, place: Path, call: Callable[..., Ended]
) -> None:
    if isinstance(frame, bytes):
        (place / "one.parquet").write_bytes(frame)
    else:
        frame.to_parquet(place / "one.parquet")
    MEASURED.to_parquet(place / "two.parquet")
    check(call(*COMPARE))
