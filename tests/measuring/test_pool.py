"""The pool on a tiny real model: what is asked once, whatever it counts for."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import yaml

from mergetune.engines.engine import EngineConfig
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.measuring.model_under_test import open_model
from mergetune.measuring.pool import Job, Pool
from mergetune.measuring.reply_store import ReplyStore


def test_an_item_of_two_scores_is_asked_once(tiny_base: Path, tmp_path: Path) -> None:
    items = [{"prompt": f"Is {i} even?", "choices": ["Yes", "No"], "answer": i % 2} for i in range(12)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {"items": "items.jsonl", "scorer": "choice"}
    suite = {
        "description": "test",
        "chat_template": True,
        "holdout": 0,
        "objectives": {"parity": {"tasks": [task]}},
        "guards": {"calm": {"margin": 0.1, "tasks": [task]}},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    evaluator = Evaluator(read_suite(tmp_path / "suite.yaml"))
    model, store = open_model(str(tiny_base)), ReplyStore(tmp_path / "store")
    config = EngineConfig(kind="transformers", batch_size=2)  # so that the requests come in parts
    with closing(Pool(model, config, evaluator, store)) as pool:
        first = pool.measured(Job("test", evaluator.documents("all")))
    found = first.measurement.items.set_index("score_name")["score"]
    assert first.n_asked == 24
    assert found["parity"].tolist() == found["calm"].tolist()
    assert len(list((tmp_path / "store").glob("*.parquet"))) == 1
    with closing(Pool(model, config, evaluator, store)) as again:
        assert again.measured(Job("test", evaluator.documents("all"))).n_asked == 0
        assert again.engine is None


def test_replies_are_known_by_the_engine_that_gave_them(tiny_base: Path, tmp_path: Path) -> None:
    items = [{"prompt": f"Is {i} even?", "choices": ["Yes", "No"], "answer": i % 2} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {"items": "items.jsonl", "scorer": "choice"}
    objectives = {"parity": {"tasks": [task]}}
    suite = {"description": "test", "chat_template": True, "holdout": 0, "objectives": objectives}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    evaluator = Evaluator(read_suite(tmp_path / "suite.yaml"))
    model, store = open_model(str(tiny_base)), ReplyStore(tmp_path / "store")
    with closing(Pool(model, EngineConfig(kind="auto"), evaluator, store)) as pool:
        pool.measured(Job("test", evaluator.documents("all")))
        settled = pool.config
    assert settled.kind != "auto"
    with closing(Pool(model, settled, evaluator, store)) as again:
        assert again.measured(Job("test", evaluator.documents("all"))).n_asked == 0
