"""Replies kept by content: what comes back, and what is never asked twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from mergetune.errors import MergetuneError
from mergetune.evaluation.lm_requests import ask, request_key
from mergetune.measuring.reply_store import ReplyStore, StoredLM


class CountingLM(LM):  # type: ignore[misc]  # lm-eval ships no types
    """Replies with the number of the request, and breaks when it is told to."""

    def __init__(self, breaks_at: int = -1) -> None:
        super().__init__()
        self.n_calls, self.n_asked, self.breaks_at = 0, 0, breaks_at
        self.requests_at_a_time: int | None = None

    def _answer(self, requests: list[Instance]) -> range:
        if self.n_calls == self.breaks_at:
            raise RuntimeError("gone")
        self.n_calls += 1
        self.n_asked += len(requests)
        return range(self.n_asked - len(requests), self.n_asked)

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        return [f"reply {n}" for n in self._answer(requests)]

    def reply_seconds(self, requests: list[Instance], **_: Any) -> list[float]:
        return [n / 8 for n in self._answer(requests)]

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        return [(-float(n), n % 2 == 0) for n in self._answer(requests)]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        return [-float(n) for n in self._answer(requests)]


def generation(prompt: str, repeats: int = 1, **settings: Any) -> Instance:
    return Instance("generate_until", {}, (prompt, settings), 0, ("task", 0, repeats))


def timed(prompt: str) -> Instance:
    return Instance("reply_seconds", {}, (prompt, {}), 0, ("task", 0, 1))


def stored(lm: LM, folder: Path) -> StoredLM:
    return StoredLM(lm, ReplyStore(folder), "model")


def ask_once(lm: LM, folder: Path, requests: list[Instance]) -> None:
    """Fetch what is not in the store from the model, and put the requests to the store."""
    kept = stored(lm, folder)
    kept.fetch(lm, kept.missing(requests))
    ask(kept, requests)


def test_replies_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    likelihood = Instance("loglikelihood", {}, ("one", " two"), 0, ("task", 0, 1))
    rolling = Instance("loglikelihood_rolling", {}, ("one two",), 0, ("task", 0, 1))
    requests = [generation("one"), likelihood, rolling, timed("one")]
    lm = CountingLM()
    ask_once(lm, tmp_path, requests)
    first = [request.resps for request in requests]
    assert first == [["reply 0"], [(-1.0, False)], [-2.0], [0.375]]
    ask_once(lm, tmp_path, requests)
    assert [request.resps for request in requests] == first
    assert lm.n_asked == 4


def test_a_file_of_an_earlier_version_is_read_and_written_on(tmp_path: Path) -> None:
    likelihood = Instance("loglikelihood", {}, ("one", " two"), 0, ("task", 0, 1))
    requests = [generation("one"), likelihood, Instance("loglikelihood_rolling", {}, ("one two",), 0)]
    before = pd.DataFrame(
        {
            "key": list(map(request_key, requests)),
            "text": ["yes", None, None],
            "loglikelihood": [math.nan, -1.5, -2.5],
            "is_greedy": pd.array([None, True, None], dtype="boolean"),
        }
    )
    before.to_parquet(tmp_path / "model.parquet")
    lm = CountingLM()
    for _ in range(2):
        ask_once(lm, tmp_path, [*requests, generation("two")])
        assert [request.resps for request in requests] == [["yes"], [(-1.5, True)], [-2.5]]
    assert lm.n_asked == 1


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    pd.DataFrame({"key": ["a"], "text": ["b"]}).to_parquet(tmp_path / "model.parquet")
    with pytest.raises(MergetuneError, match=r"model\.parquet: cannot be read"):
        ReplyStore(tmp_path).read("model")


def test_a_time_belongs_to_the_machine_that_it_was_taken_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, requests = CountingLM(), [generation("one"), timed("one")]
    ask_once(lm, tmp_path, requests)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert [stored(lm, tmp_path).knows(request) for request in requests] == [True, False]
    ask_once(lm, tmp_path, requests)
    assert [request.resps for request in requests] == [["reply 0"], [0.25]]
    monkeypatch.undo()
    ask_once(lm, tmp_path, requests)
    assert [request.resps for request in requests] == [["reply 0"], [0.125]]
    assert lm.n_asked == 3


def test_times_are_kept_in_parts_for_each_waits_for_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="gone"):
        ask_once(CountingLM(breaks_at=2), tmp_path, [timed(f"prompt {n}") for n in range(200)])
    assert len(ReplyStore(tmp_path).read("model")) == 128


def test_a_reply_belongs_to_its_prompt_and_its_decoding(tmp_path: Path) -> None:
    lm = CountingLM()
    for request in (generation("one"), generation("two"), generation("one", until=["."])):
        ask_once(lm, tmp_path, [request])
    assert lm.n_asked == 3


def test_equal_requests_are_asked_once_and_repeats_drawn_as_often(tmp_path: Path) -> None:
    plain: Callable[[list[Instance]], None] = partial(ask, CountingLM())
    for put in (plain, partial(ask_once, CountingLM(), tmp_path)):
        twice, drawn = [generation("one"), generation("one")], generation("two", repeats=3)
        put([*twice, drawn])
        assert [request.resps for request in twice] == [["reply 0"]] * 2
        assert drawn.resps == ["reply 1", "reply 2", "reply 3"]


def test_what_was_replied_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergetune.measuring.reply_store._AT_A_TIME", 4)
    requests = [generation(f"prompt {n}") for n in range(10)]
    with pytest.raises(RuntimeError, match="gone"):
        ask_once(CountingLM(breaks_at=2), tmp_path, requests)
    lm = CountingLM()
    ask_once(lm, tmp_path, requests)
    assert lm.n_asked == 2
    assert [request.resps[0] for request in requests[:8]] == [f"reply {n}" for n in range(8)]


def test_an_engine_says_how_many_requests_a_lost_process_costs(tmp_path: Path) -> None:
    lm = CountingLM(breaks_at=2)
    lm.requests_at_a_time = 3
    with pytest.raises(RuntimeError, match="gone"):
        ask_once(lm, tmp_path, [generation(f"prompt {n}") for n in range(10)])
    assert len(ReplyStore(tmp_path).read("model")) == 6


def test_a_log_likelihood_that_is_no_number_is_asked_again(tmp_path: Path) -> None:
    class Broken(CountingLM):
        def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
            super().loglikelihood(requests)
            return [(float("nan"), False)] * len(requests)

    lm = Broken()
    for _ in range(2):
        ask_once(lm, tmp_path, [Instance("loglikelihood", {}, ("one", " two"), 0, ("task", 0, 1))])
    assert lm.n_asked == 2


def test_two_that_write_forget_nothing(tmp_path: Path) -> None:
    first, second = stored(CountingLM(), tmp_path), stored(CountingLM(), tmp_path)
    first.fetch(CountingLM(), first.missing([generation("one")]))
    second.fetch(CountingLM(), second.missing([generation("two")]))
    assert ReplyStore(tmp_path).read("model").keys() == {
        request_key(generation("one")),
        request_key(generation("two")),
    }
