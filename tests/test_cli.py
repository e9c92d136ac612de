"""The command line as a user meets it: help, exit codes, messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers import build_llama, fine_tune, mergetune, train_adapter
from mergetune.merging.inputs import open_inputs
from mergetune.space.recipe import MergeRecipe
from studies import write_study, write_suite


def test_help_lists_the_verbs_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from mergetune.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'optuna', 'pandas', 'altair'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("run", "inspect", "merge", "eval", "report", "presets", "demo"):
        assert f" {verb} " in done.stdout
    assert "Exit codes" in done.stdout


def test_wrong_usage_is_an_error_and_no_verdict() -> None:
    assert mergetune("run").returncode == 3
    assert mergetune("rnu").returncode == 3


def test_presets_are_listed_with_their_reasons() -> None:
    done = mergetune("presets")
    assert done.returncode == 0
    assert "task_arithmetic_layer_groups" in done.stdout
    assert "taskmaster" in done.stdout


def test_an_error_is_one_message_and_debug_gives_the_traceback(tmp_path: Path) -> None:
    plain = mergetune("run", tmp_path / "absent.yaml")
    assert (plain.returncode, plain.stdout) == (3, "")
    assert plain.stderr.startswith("error: ")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in mergetune("--debug", "run", tmp_path / "absent.yaml").stderr
    assert "Traceback" in mergetune("run", tmp_path / "absent.yaml", "--debug").stderr


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"experts": {"a": "absent"}}, ["absent: there is no such model directory"]),
        ({"serach_space": "x"}, ["study.yaml", "`serach_space`: unknown key", "Did you mean `search_space`"]),
        ({"engine": {"kind": "transformer"}}, ["`engine.kind`", "'transformer'"]),
        ({"engine": "vlm"}, ["`engine`: must be 'auto', 'transformers' or 'vllm', but got 'vlm'"]),
        (
            {"budget": 40},
            ["`budget`: must be `key: value` pairs (trials, hours, items, patience, target), but got 40"],
        ),
        ({"engine": {"batchsize": 3}}, ["`engine.batchsize`: unknown key", "Did you mean `batch_size`"]),
        (
            {"search_space": "task_aritmetic"},
            ["`task_aritmetic` is no preset", "Did you mean `task_arithmetic`"],
        ),
        ({"suite": "absent.yaml"}, ["absent.yaml: there is no such file"]),
        ({"sampler": "TPE"}, ["`sampler` must be `auto` or a class of optuna.samplers", "TPE"]),
        ({"budget": {"trials": -1}}, ["`budget.trials`", "greater than or equal to 0"]),
        ({"experts": {}}, ["`experts`"]),
    ],
)
def test_a_broken_study_file_is_explained_before_any_work(
    tmp_path: Path,
    tiny_base: Path,
    tiny_experts: dict[str, Path],
    changes: dict[str, Any],
    messages: list[str],
) -> None:
    study = write_study(tmp_path, tiny_base, tiny_experts, **changes)
    done = mergetune("run", study, "--out", tmp_path / "run")
    assert done.returncode == 3
    for message in messages:
        assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_experts_whose_paths_end_alike_are_told_apart_by_name(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    for name, expert in tiny_experts.items():
        shutil.copytree(expert, tmp_path / f"lr={name}" / "final")
    alike = ["lr=a/final", "lr=b/final"]  # directories, though there is a `=` in them
    done = mergetune("inspect", tiny_base, *alike, cwd=tmp_path)
    assert done.returncode == 3
    assert "lr=a/final and lr=b/final are both `final`. Name one, such as other=lr=b/final" in done.stderr
    done = mergetune("inspect", tiny_base, alike[0], f"other={alike[1]}", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["experts"]) == {"final", "other"}


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def add_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[50:52]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(data))


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (truncate, ["model.safetensors", "damaged or incomplete"]),
        (add_nan, ["Expert `a`", "model.norm.weight", "NaN"]),
        (change_tokenizer, ["tokens differ from the base's tokenizer"]),
        (only_pickle, ["pytorch_model.bin", "pickle"]),
    ],
)
def test_a_damaged_expert_is_explained(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path], damage: Any, messages: list[str]
) -> None:
    expert = Path(shutil.copytree(tiny_experts["a"], tmp_path / "expert"))
    damage(expert)
    done = mergetune("run", write_study(tmp_path, tiny_base, {"a": expert}), "--out", tmp_path / "run")
    assert done.returncode == 3
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_expert_of_another_size_and_an_adapter_of_another_base_are_refused(
    tmp_path: Path, tiny_base: Path
) -> None:
    wide = build_llama(tmp_path / "wide", hidden_size=64)
    done = mergetune("inspect", tiny_base, fine_tune(wide, tmp_path / "expert", seed=1, std=0.01))
    assert done.returncode == 3
    assert "hidden_size" in done.stderr
    adapter = train_adapter(wide, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    done = mergetune("inspect", tiny_base, adapter)
    assert done.returncode == 3
    assert "names" in done.stderr
    assert "as its base" in done.stderr


def test_eval_scores_a_model_and_an_adapter(tmp_path: Path, tiny_base: Path, tiny_adapter: Path) -> None:
    write_study(tmp_path, tiny_base, {})
    suite = ["--suite", "./suite.yaml", "--engine", "transformers"]
    done = mergetune("eval", tiny_base, *suite, "--json", "--out", "out/scores.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parity"]["n_items"] == 16
    assert (tmp_path / "out" / "scores.parquet").exists()
    done = mergetune("eval", tiny_adapter, *suite, cwd=tmp_path)
    assert (done.returncode, "--base" in done.stderr) == (3, True)
    done = mergetune("eval", tiny_adapter, "--base", tiny_base, *suite, "--split", "search", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parity" in done.stdout


def test_eval_asks_nothing_twice(tmp_path: Path, tiny_base: Path) -> None:
    write_study(tmp_path, tiny_base, {})
    command = ["eval", tiny_base, "--suite", "./suite.yaml", "--engine", "transformers", "--json"]
    first, again = (mergetune(*command, "--cache", "cache", cwd=tmp_path) for _ in range(2))
    assert ": 48 items measured\n" in first.stderr
    assert "0 items measured, 48 known before" in again.stderr
    assert again.stdout == first.stdout


def test_all_options_of_the_engine_come_from_a_file(tmp_path: Path, tiny_base: Path) -> None:
    study = write_study(tmp_path, tiny_base, {}, engine={"kind": "transformers", "max_length": 128})
    given = ["--suite", "./suite.yaml", "--engine", study.name, "--cache", "cache"]
    done = mergetune("eval", tiny_base, *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "engine: transformers, as asked for" in done.stderr
    study.write_text("engine: {kind: vllm, tensor_paralel_size: 2}")
    for command in (
        ["eval", tiny_base],
        ["check", tiny_base, "--baseline", tiny_base],
        ["soup", "out", "a", "b"],
    ):
        done = mergetune(*command, *given, cwd=tmp_path)
        assert done.returncode == 3
        assert "`engine.tensor_paralel_size`: unknown key. Did you mean `tensor_parallel_size`" in done.stderr


def test_report_and_merge_work_on_a_run(
    tmp_path: Path, tiny_base: Path, tiny_experts: dict[str, Path]
) -> None:
    study = write_study(tmp_path, tiny_base, tiny_experts, budget={"trials": 1})
    done = mergetune("run", study, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report, model = (line.split(": ", 1)[1] for line in done.stdout.splitlines()[-2:])
    assert (tmp_path / report).name == "index.html"
    assert (tmp_path / model / "model.safetensors").exists()
    done = mergetune("report", tmp_path / "runs" / "study")
    assert done.returncode == 0, done.stderr
    recipe = next((tmp_path / "runs" / "study" / "report" / "recipes").glob("*.yaml"))
    done = mergetune("merge", recipe, tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "config.json").exists()
    again = yaml.safe_load((tmp_path / "runs" / "study" / "study.yaml").read_text())
    assert again["base"] == str(tiny_base)
    done = mergetune("report", tmp_path)
    assert (done.returncode, "is no run directory" in done.stderr) == (3, True)


def test_merge_writes_an_adapter_that_check_compares_with_the_merge(
    tmp_path: Path, tiny_base: Path, tiny_adapter: Path
) -> None:
    other = train_adapter(tiny_base, tmp_path / "b", seed=3, r=6, target_modules=["q_proj", "up_proj"])
    inputs = open_inputs(tiny_base, {"a": tiny_adapter, "b": other})
    sources = inputs.base_source, inputs.expert_sources
    lambdas = {"lambda": {"a": 0.7, "b": 0.4}}
    MergeRecipe.of_one_group("task_arithmetic", *sources, lambdas).write(tmp_path / "recipe.yaml")
    done = mergetune("merge", "recipe.yaml", "exact", "--adapter", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "It changes 8 layers, ranks 4 to 10: exact." in done.stdout
    assert "vLLM serves it with `--enable-lora --max-lora-rank 16`." in done.stdout
    done = mergetune("merge", "recipe.yaml", "small", "--adapter", "--rank", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj\.weight +2 +2 +\d+\.\d+% +\d+\.\d+%", done.stdout)
    assert re.search(r"8 layers, rank 2: relative Frobenius error \d+\.\d+%, at most", done.stdout)
    suite = write_suite(tmp_path, ["1"] * 8)
    how = ("--suite", suite.path, "--engine", "transformers", "--cache", "cache", "--json")
    for adapter in ("exact", "small"):
        pair = (adapter, "--base", tiny_base, "--baseline", "recipe.yaml")
        done = mergetune("check", *pair, *how, cwd=tmp_path)
        assert done.returncode in (0, 1, 2), done.stderr
        if adapter == "exact":
            assert json.loads(done.stdout)["flips"] == []
    done = mergetune("merge", "recipe.yaml", "out", "--rank", "2", cwd=tmp_path)
    assert (done.returncode, "--rank 2 goes with --adapter" in done.stderr) == (3, True)
