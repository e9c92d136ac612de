"""Latency as a score of items: seconds of lone replies, kept, repeated and guarded as other scores are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from lm_eval.api.instance import Instance

from helpers import mergetune
from mergetune.engines.completions import TokenizerPrompts
from mergetune.engines.engine import Engine, EngineConfig
from mergetune.engines.start import start_engine
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator, Measurement
from mergetune.evaluation.suite import read_suite
from mergetune.gate.run import CheckOptions, check_stored
from mergetune.measuring.reply_store import ReplyStore, StoredLM
from mergetune.slopes.references import find_references

PROMPTS = [{"prompt": f"Say {n}.", "answer": "e"} for n in range(4)]
LATENCY = {"items": "items.jsonl", "scorer": "latency", "max_new_tokens": 8}


class Clockwork(TokenizerPrompts):
    """A model whose replies take what is made up for each request; all that it is asked is kept."""

    def __init__(self, tokenizer: Any, seconds: Any = lambda _: 0.5) -> None:
        super().__init__(tokenizer)
        self.seconds, self.asked = seconds, list[Instance]()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += requests
        return ["e"] * len(requests)

    def reply_seconds(self, requests: list[Instance]) -> list[float]:
        self.asked += requests
        return [self.seconds(request) for request in requests]


@pytest.fixture(scope="module")
def started(tiny_base: Path) -> Iterator[Engine]:
    engine = start_engine(EngineConfig(kind="transformers", device="cpu", batch_size=8), tiny_base)
    yield engine
    engine.close()


@pytest.fixture
def tokenizer(started: Engine) -> Any:
    lm: Any = started.lm
    return lm.tokenizer


def write_suite(folder: Path, rows: list[Any] = PROMPTS, **objectives: dict[str, Any]) -> Path:
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = {name: {"tasks": [task]} for name, task in objectives.items()}
    data = {"description": "x", "chat_template": True, "holdout": 0, "objectives": scores}
    (folder / "suite.yaml").write_text(yaml.safe_dump(data))
    return folder / "suite.yaml"


def evaluator(folder: Path, rows: list[Any] = PROMPTS, **objectives: dict[str, Any]) -> Evaluator:
    return Evaluator(read_suite(write_suite(folder, rows, **objectives)))


def timed(folder: Path, lm: Any, rows: list[Any] = PROMPTS, **task: Any) -> Measurement:
    return evaluator(folder, rows, o={**LATENCY, **task}).measure(lm, "search")


def fetched(ready: Evaluator, lm: Any, store: ReplyStore) -> Measurement:
    """Measure with what is in the store, and what is not yet."""
    kept, documents = StoredLM(lm, store, "model"), ready.documents("search")
    requests = [
        each for asked in ready.requests(kept, documents).values() for own in asked.values() for each in own
    ]
    kept.fetch(lm, kept.missing(requests))
    return ready.measure_documents(kept, documents)


def test_a_quick_reply_is_better_and_its_seconds_are_on_record(tmp_path: Path, tokenizer: Any) -> None:
    ready = evaluator(tmp_path, o=LATENCY)
    assert ready.suite.config.objectives["o"].better == "minimize"
    assert set(ready.items()["target"]) == {"a quick reply"}
    found = ready.measure(Clockwork(tokenizer, lambda _: 1.23456), "search").items
    assert found["score"].tolist() == [1.23456] * 4
    assert set(found["response"]) == {"1.23 s"}


def test_times_are_kept_apart_from_replies_and_not_taken_again(tmp_path: Path, started: Engine) -> None:
    ready = evaluator(tmp_path, say={**LATENCY, "scorer": "contains"}, quick=LATENCY, cheap=LATENCY)
    store = ReplyStore(tmp_path / "store")

    def measured() -> pd.DataFrame:
        return fetched(ready, started.lm, store).items

    first = measured()
    by_score = {str(name): own["score"].tolist() for name, own in first.groupby("score_name")}
    assert all(seconds > 0 for seconds in by_score["quick"])
    assert by_score["quick"] == by_score["cheap"]  # the same request
    assert len(store.read("model")) == 2 * len(PROMPTS)
    pd.testing.assert_frame_equal(measured(), first)


def test_a_greedy_reply_is_timed_as_often_as_it_is_repeated(tmp_path: Path, started: Engine) -> None:
    lm: Any = started.lm
    store = ReplyStore(tmp_path / "store")
    sampling = {"temperature": 0, "repeats": 3}
    found = fetched(evaluator(tmp_path, o={**LATENCY, "sampling": sampling}), lm, store).items
    seconds: list[Any] = list(store.read("model").values())
    assert len(seconds) == 3 * len(PROMPTS)
    assert len(set(seconds)) > len(PROMPTS)
    assert found["score"].mean() == pytest.approx(sum(seconds) / len(seconds))
    assert found["response"].str.count(r"\[\d\] [\d.e-]+ s").tolist() == [3] * len(PROMPTS)
    asked = evaluator(tmp_path, o={**LATENCY, "sampling": sampling}).requests(lm, {"o:items.jsonl": [0]})
    repeats = asked["o:items.jsonl"][0]
    assert [each.args[1]["do_sample"] for each in repeats] == [False] * 3
    greedy = Instance("generate_until", {}, (repeats[0].args[0], {"until": [], "max_gen_toks": 8}), 0)
    assert lm.generate_until(repeats) == 3 * lm.generate_until([greedy])


def test_the_worst_of_repeats_is_the_slowest(tmp_path: Path, tokenizer: Any) -> None:
    sampling = {"temperature": 0.7, "repeats": 4, "count": "worst"}
    lm = Clockwork(tokenizer, lambda request: 1.0 + request.idx)
    assert timed(tmp_path, lm, sampling=sampling).items["score"].tolist() == [4.0] * 4
    assert len({(each.args[0], each.args[1]["seed"]) for each in lm.asked}) == 16


def test_only_times_are_taken_of_greedy_repeats(tmp_path: Path) -> None:
    task = {**LATENCY, "scorer": "contains", "sampling": {"temperature": 0, "repeats": 2}}
    with pytest.raises(MergetuneError, match=r"`sampling.temperature` must be > 0.*leave `sampling` out"):
        read_suite(write_suite(tmp_path, o=task))


def test_every_turn_is_timed_with_what_went_before(tmp_path: Path, tokenizer: Any) -> None:
    said = ("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")
    rows = [{"messages": [{"role": role, "content": f"{text} {n}"} for role, text in said]} for n in range(3)]
    lm = Clockwork(tokenizer, lambda request: 3.0 if "Two." in request.args[0] else 1.0)
    shots = {"num_fewshot": 1, "fewshot_items": "shots.jsonl"}
    shown = [{"role": "user", "content": "Show."}, {"role": "assistant", "content": "Shown."}]
    (tmp_path / "shots.jsonl").write_text(json.dumps({"messages": shown}))
    found = timed(tmp_path, lm, rows, score_turns="all", limit=2, **shots).items
    assert found["score"].tolist() == [2.0] * 2
    assert set(found["response"]) == {"[1] 1 s\n[2] 3 s"}
    assert all("Shown." in each.args[0] for each in lm.asked)


def test_times_have_no_slopes(tmp_path: Path, started: Engine) -> None:
    lm: Any = started.lm
    ready = evaluator(tmp_path, o=LATENCY)
    found = find_references(ready, lm, replies=[ready.measure(lm, "search").items])
    assert found.items == ()
    assert "times, and no text" in found.missing["o:items.jsonl"]


@pytest.mark.parametrize("scorers", [("latency", "contains"), ("contains", "latency")])
def test_times_are_not_scored_as_replies_nor_replies_as_times(
    tmp_path: Path, tokenizer: Any, scorers: tuple[str, str]
) -> None:
    before, after = ({**LATENCY, "scorer": scorer} for scorer in scorers)
    measured = evaluator(tmp_path, o=before).measure(Clockwork(tokenizer), "search")
    file = tmp_path / "measured.parquet"
    measured.items.to_parquet(file)
    assert check_stored(file, file, read_suite(tmp_path / "suite.yaml"), CheckOptions()).check.verdict
    with pytest.raises(MergetuneError, match="was asked otherwise"):
        check_stored(file, file, read_suite(write_suite(tmp_path, o=after)), CheckOptions())


def test_eval_prints_a_guard_of_seconds_and_takes_no_time_twice(tmp_path: Path, tiny_base: Path) -> None:
    write_suite(tmp_path, say={**LATENCY, "scorer": "contains"})
    data = yaml.safe_load((tmp_path / "suite.yaml").read_text())
    guards = {"waiting": {"margin": 0.2, "tasks": [LATENCY]}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**data, "guards": guards}))
    command = ["eval", tiny_base, "--suite", "./suite.yaml", "--engine", "transformers", "--cache", "cache"]
    first, again = (mergetune(*command, "--out", "scores.parquet", cwd=tmp_path) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert "waiting" in first.stdout
    assert again.stdout == first.stdout
    assert "0 items measured, 8 known before" in again.stderr
    scores = pd.read_parquet(tmp_path / "scores.parquet").groupby("score_name")["score"]
    assert scores.get_group("waiting").gt(0).all()
