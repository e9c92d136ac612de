"""How long replies take: each alone, by the clock, in this process and behind a server."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.api.instance import Instance

from mergetune.engines.chat_lm import served_lm
from mergetune.engines.engine import EngineConfig
from mergetune.engines.reply_times import ReplyTimes
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.errors import MergetuneError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import read_suite
from plain_server import plain_server

DELAY = 0.1  # of a server's reply, in seconds


def request(prompt: str, n_tokens: int, kind: str = "reply_seconds") -> Instance:
    return Instance(kind, {}, (prompt, {"until": [], "max_gen_toks": n_tokens, "do_sample": False}), 0)


def test_each_reply_is_asked_alone_after_one_that_does_not_count() -> None:
    class Slow(ReplyTimes):
        """Takes long for its first reply, and then as long as the prompt says."""

        def __init__(self) -> None:
            self.asked: list[list[str]] = []

        def generate_until(self, requests: list[Instance]) -> list[str]:
            self.asked.append([each.args[0] for each in requests])
            time.sleep(0.4 if len(self.asked) == 1 else float(requests[0].args[0]))
            return [""] * len(requests)

    lm = Slow()
    seconds = lm.reply_seconds([request("0.02", 1), request("0.1", 1)])
    assert lm.asked == [["0.02"], ["0.02"], ["0.1"]]
    assert 0.02 <= seconds[0] < 0.1 <= seconds[1] < 0.4


def test_seconds_are_those_of_a_lone_reply(engine: TransformersEngine) -> None:
    lm: Any = engine.lm
    prompts = [f"Count to {n}." for n in range(6)]
    seconds = lm.reply_seconds([request(prompt, 32) for prompt in prompts])
    began = time.perf_counter()
    for prompt in prompts:
        lm.generate_until([request(prompt, 32, "generate_until")])
    plain = time.perf_counter() - began
    assert all(each > 0 for each in seconds)
    assert plain / 5 < sum(seconds) < 5 * plain
    (short,), (long,) = lm.reply_seconds([request("x", 2)]), lm.reply_seconds([request("x", 200)])
    assert long > 5 * short


def test_a_reply_that_does_not_fit_is_too_long_to_be_timed_as_well(tiny_base: Path) -> None:
    engine = TransformersEngine(EngineConfig(device="cpu", max_length=64), tiny_base)
    lm: Any = engine.lm
    kinds = "generate_until", "reply_seconds"
    excess = [lm.excess_tokens(request("Count to three.", 60, kind)) for kind in kinds]
    assert excess[0] == excess[1] > 0
    with pytest.raises(MergetuneError, match="must fit into the model's length"):
        lm.reply_seconds([request("Count to three.", 60)])
    engine.close()


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize(("scorer", "n_at_once"), [("latency", 1), ("exact", 4)])
def test_a_server_is_asked_one_request_at_a_time(
    tmp_path: Path, scorer: str, n_at_once: int, chat_template: bool
) -> None:
    lock = threading.Lock()
    under_way, seen = 0, list[int]()
    together = threading.Barrier(n_at_once)

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal under_way
        with lock:
            under_way += 1
            seen.append(under_way)
        together.wait(10)  # where several come at once, until they are there
        time.sleep(DELAY)
        with lock:
            under_way -= 1
        said = {"message": {"content": "yes"}} if "chat" in body["path"] else {"text": "yes"}
        return 200, {"choices": [said]}

    rows = [{"prompt": f"Say {n}.", "answer": "yes"} for n in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    score = {"tasks": [{"items": "items.jsonl", "scorer": scorer}]}
    data = {"description": "x", "chat_template": chat_template, "holdout": 0, "objectives": {"o": score}}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(data))
    with plain_server(answer) as url:
        lm = served_lm(url, None, None, 8, None)  # no tokenizer is needed
        found = Evaluator(read_suite(tmp_path / "suite.yaml")).measure(lm, "search").items
    assert max(seen) == n_at_once
    if scorer == "latency":
        assert len(seen) == len(rows) + 1
        assert found["score"].between(DELAY, 10 * DELAY).all()
