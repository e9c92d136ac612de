"""The benchmark on public data: what it trains on, what its suite asks, and its experts."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import bfcl
from helpers import build_llama
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Item
from mergetune.evaluation.leakage import find_leaks, read_training_texts
from mergetune.evaluation.suite import read_suite

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "public_data"
SKILLS = ("calls", "arithmetic")


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def problem(i: int) -> dict[str, Any]:
    """A problem as GSM8K has them, with a result above a thousand."""
    price, total = 1000 + i, 3 * (1000 + i)
    solution = f"Three cost 3 * ${price} = $<<3*{price}={total}>>{total:,}.\n#### {total:,}"
    return {"question": f"What do three bikes cost at ${price:,} each?", "answer": solution}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not bfcl.IS_INSTALLED:
        pytest.skip("needs bfcl-eval")
    folder = tmp_path_factory.mktemp("public")
    gsm8k = write(folder / "gsm8k.jsonl", [problem(i) for i in range(60)])
    same = {"sentence_good": "He is.", "sentence_bad": "He is."}
    pairs = [{"sentence_good": f"He is {i}.", "sentence_bad": f"He are {i}."} for i in range(30)]
    write(folder / "blimp" / "agreement.jsonl", [same, *pairs])
    leaderboard = Path(str(import_module("bfcl_eval").__file__)).parent / "data"
    data = ["--bfcl", leaderboard, "--gsm8k", gsm8k, "--blimp", folder / "blimp"]
    run("prepare.py", *data, "--out", folder / "out")
    return folder / "out"


def names(item: Item) -> set[str]:
    return {tool["function"]["name"] for tool in item.tools}


def test_no_item_and_no_function_of_the_suite_was_trained(prepared: Path) -> None:
    trained, asked = read_suite(prepared / "train.yaml"), read_suite(prepared / "suite.yaml")
    functions = [
        set().union(*(names(item) for items in suite.items.values() for item in items))
        for suite in (trained, asked)
    ]
    assert all(functions)
    assert not functions[0] & functions[1]
    training = {skill: read_training_texts(prepared / "train" / f"{skill}.jsonl") for skill in SKILLS}
    assert not find_leaks(Evaluator(asked).items().query("score_name == 'calls'"), training).trained


def test_results_are_found_with_and_without_commas_and_not_within_other_numbers(prepared: Path) -> None:
    suite = read_suite(prepared / "suite.yaml")
    scorer: Any = suite.config.objectives["arithmetic"].tasks[0].scorer
    item = next(items[0] for name, items in suite.items.items() if name.startswith("arithmetic"))
    total = int(str(item.answer).rpartition("####")[2].replace(",", ""))
    said = [f"${total:,}.", f"<<{total}>>", f"{total}.00", f"1{total}", f"{total}.5", f"{total},000", "3"]
    assert scorer.score([item] * len(said), said) == [1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("skill", SKILLS)
def test_experts_are_trained_on_all_dialogues(prepared: Path, tmp_path: Path, skill: str) -> None:
    base = build_llama(tmp_path / "base", max_position_embeddings=4096)
    config = base / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 4096}))
    said = run("train.py", skill, "--out", prepared, "--base", base, "--steps", 2)
    n_dialogues = len((prepared / "train" / f"{skill}.jsonl").read_text(encoding="utf-8").splitlines())
    assert f"{skill}: {n_dialogues} of {n_dialogues} dialogues" in said
    trained = load_file(prepared / "experts" / skill / "adapter_model.safetensors")
    assert all(weight.any() for weight in trained.values())
