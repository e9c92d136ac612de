"""A judge on this machine is started for what was not judged, and is known by its weights."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from helpers import build_tokenizer, mergetune
from mergetune.engines.engine import EngineConfig
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.items import Item
from mergetune.evaluation.scorers import JudgeScorer
from mergetune.evaluation.suite import read_suite
from scoring import write_items
from scoring import write_suite as suite_of

LENGTH = 4096


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGETUNE_CACHE", str(tmp_path / "cache"))


def build_judge(folder: Path, says: str) -> Path:
    """Save a model that says one thing to whatever it is asked: each token alone decides on the next."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_tokens([says])
    tokenizer.model_max_length = LENGTH
    size = len(tokenizer)
    config: dict[str, Any] = {
        **{"vocab_size": size, "hidden_size": 336, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "max_position_embeddings": LENGTH, "tie_word_embeddings": False},
        **{"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
    }
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(LlamaConfig(**config))
    (layer,) = model.model.layers
    said, end = tokenizer.encode(says)[0], tokenizer.eos_token_id
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 336))
        model.lm_head.weight.zero_()
        model.lm_head.weight[said] = 1.0  # after any token
        model.lm_head.weight[end, said] = 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_judge(tmp_path_factory.mktemp("models") / "judge", '{"score": 4}')


def write_suite(folder: Path, model: Path, **options: Any) -> Path:
    write_items(folder, *({"prompt": f"Capital of {land}?"} for land in ("Norway", "Peru", "Chad")))
    (folder / "rubric.md").write_text("Be brief.")
    scorer: dict[str, Any] = {
        "kind": "judge",
        "model": str(model),
        "rubric": "rubric.md",
        "max_new_tokens": 16,
    }
    scorer |= {"engine": "transformers", **options}
    return suite_of(folder, {"scorer": scorer, "max_new_tokens": 4}, chat_template=True)


def scorer_of(folder: Path, model: Path, **options: Any) -> JudgeScorer:
    scorer = read_suite(write_suite(folder, model, **options)).config.objectives["skill"].tasks[0].scorer
    assert isinstance(scorer, JudgeScorer)
    return scorer


ITEMS = [Item(prompt="Hello?"), Item(prompt="Bye?")]


def test_a_model_is_judged_beside_its_living_engine(tmp_path: Path, judge: Path, tiny_base: Path) -> None:
    evaluator = Evaluator(read_suite(write_suite(tmp_path, judge)))
    engine = TransformersEngine(EngineConfig(device="cpu"), tiny_base)
    found = evaluator.measure(engine.lm, "search")
    assert found.scores()["skill"].value == 0.75
    assert found.scores()["skill"].n_items == 3
    gc.collect()
    assert [each for each in gc.get_objects() if isinstance(each, TransformersEngine)] == [engine]
    engine.close()


def test_what_was_judged_starts_nothing(tmp_path: Path, judge: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(judge, own)
    scorer = scorer_of(tmp_path, own)
    assert scorer.score(ITEMS, ["Hi", "Bye"]) == [0.75, 0.75]
    shutil.rmtree(own)
    assert scorer.score(ITEMS, ["Hi", "Bye"]) == [0.75, 0.75]
    with pytest.raises(MergetuneError, match=r"The judge `.*own`: .*The verdicts that were given are kept"):
        scorer.score(ITEMS, ["Hi", "Farewell"])


def test_a_judge_is_known_by_its_weights_and_files_alone(tmp_path: Path, judge: Path) -> None:
    def rules(model: Path, **options: Any) -> str:
        return Evaluator(read_suite(write_suite(tmp_path, model, **options))).rules

    own = tmp_path / "own"
    shutil.copytree(judge, own)
    first = rules(judge)
    assert first == rules(own) == rules(own, engine={"kind": "transformers", "batch_size": 2})
    (own / "chat_template.jinja").write_text((own / "chat_template.jinja").read_text() + " ")
    second = rules(own)
    weights = load_file(own / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, rules(own)}) == 3


def test_what_is_no_verdict_ends_the_run_and_names_the_judge(tmp_path: Path) -> None:
    talker = build_judge(tmp_path / "talker", "I like it.")
    message = r"The judge `.*talker`: .*3 times there was none .*: it holds no JSON object\. .*'I like it\.'"
    with pytest.raises(MergetuneError, match=message):
        scorer_of(tmp_path, talker).score(ITEMS, ["Hi", "Bye"])


def test_repeats_are_drawn_with_seeds_of_their_own(tmp_path: Path, judge: Path) -> None:
    scorer = scorer_of(tmp_path, judge, temperature=0.1, repeats=3)
    assert scorer.score(ITEMS, ["Hi", "Bye"]) == [0.75, 0.75]
    (file,) = (tmp_path / "cache" / "verdicts").glob("*.jsonl")
    assert len(set(file.read_text().split("\n"))) == 1 + 2 * 3


def test_a_judge_that_does_not_fit_beside_what_is_in_memory_is_refused(
    tmp_path: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(tmp_path, judge, engine={"kind": "transformers", "device": "cpu"})
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(MergetuneError, match=r"The judge `.*judge`: .*weights alone need .* free on `cpu`"):
        scorer.score(ITEMS, ["Hi", "Bye"])


def test_a_question_that_is_too_long_and_a_quantized_judge_are_named(tmp_path: Path, judge: Path) -> None:
    scorer = scorer_of(tmp_path, judge, engine={"kind": "transformers", "max_length": 300})
    with pytest.raises(MergetuneError, match="must fit into the model's length of 300 tokens"):
        scorer.score(ITEMS, ["Hi", "Bye"])
    own = tmp_path / "own"
    shutil.copytree(judge, own)
    config = json.loads((own / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergetuneError, match=r"weights must not be quantized.* Serve it, and give `url`"):
        scorer_of(tmp_path, own)


def test_the_command_takes_a_judge_on_this_machine(tmp_path: Path, judge: Path, tiny_base: Path) -> None:
    suite = write_suite(tmp_path, judge)
    done = mergetune("eval", tiny_base, "--suite", suite, "--engine", "transformers", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skill"]["value"] == 0.75
