"""The endpoint against a real vLLM server, and against servers that say less than vLLM or break."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import build_llama
from mergetune.engines.chat_lm import served_lm
from mergetune.engines.completions import Choosing, Generation, Scoring
from mergetune.engines.endpoint import Endpoint
from mergetune.engines.engine import EngineConfig
from mergetune.errors import EngineError, MergetuneError, TrialError
from mergetune.evaluation.evaluate import Evaluator
from mergetune.evaluation.suite import Suite, read_suite
from mergetune.gate.run import CheckOptions, check_models
from mergetune.measuring.model_under_test import open_model
from mergetune.measuring.reply_store import ReplyStore
from plain_server import plain_server

TWINS = (70, 71)  # tokens whose logits are always the same
PROMPTS = ("What is the capital of France?", "One two three", "The quick brown fox jumps over")
GENERATION = [Generation([5, 6, 7], 4)]
SCORING = [Scoring([5, 6, 7], 1)]


@dataclass(frozen=True)
class Served:
    """A model on a vLLM server, and in transformers."""

    url: str
    folder: Path
    model: Any
    reference: HFLM


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny Llama that speaks ASCII, with heads large enough for vLLM on a CPU."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = build_llama(tmp_path_factory.mktemp("served") / "tiny", head_dim=32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        head = model.lm_head.weight
        head[[not str(tokenizer.decode([token])).isascii() for token in range(len(head))]] = 0
        head[TWINS[0]] *= 2  # so that it often is the likeliest
        head[TWINS[1]] = head[TWINS[0]]
    model.save_pretrained(folder)
    log = folder.parent / "server.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder),
                *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
                *("--max-model-len", "256", "--kv-cache-memory-bytes", "100000000"),
            ],
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server, log)
        reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        yield Served(url, folder, model, reference)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.3)
    pytest.fail(f"vLLM's server did not start: {log.read_text()[-2000:]}")


PLAIN_OPTIONS = frozenset({"prompt", "max_tokens", "stop", "temperature", "echo", "logprobs"})
OLDER_OPTIONS = PLAIN_OPTIONS | {"prompt_logprobs", "return_tokens_as_token_ids", "repetition_penalty"}


@pytest.fixture(params=["vllm", "older vllm", "plain"])
def endpoint(served: Served, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """The model behind vLLM, and behind servers that ignore some of its options."""
    if request.param == "vllm":
        yield Endpoint(served.url)
        return
    owner, known = ("vllm", OLDER_OPTIONS) if request.param == "older vllm" else ("someone", PLAIN_OPTIONS)

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        asked = {key: value for key, value in body.items() if key in known}
        choice = requests.post(f"{served.url}/v1/completions", json=asked, timeout=60).json()["choices"][0]
        return 200, {"choices": [choice]}

    with plain_server(answer, owner) as url:
        yield Endpoint(url)


def test_token_scores_are_those_of_transformers(endpoint: Endpoint, served: Served) -> None:
    tokenizer = served.reference.tokenizer
    texts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    starts = [2, 2, 2, len(texts[0])]
    texts.append(_greedy(served, texts[0], 12))
    for text, start, found in zip(texts, starts, endpoint.score([*map(Scoring, texts, starts)]), strict=True):
        own = torch.tensor(text[start:])
        logprobs = _logprobs(served, text)[start - 1 : -1]  # (n_scored, n_vocabulary)
        assert found.logprobs == pytest.approx(logprobs.gather(1, own[:, None])[:, 0].tolist(), abs=1e-3)
        if start > 2:
            assert all(found.are_likeliest)
        else:
            assert not any(found.are_likeliest)


def test_candidates_are_scored_as_by_transformers(endpoint: Endpoint, served: Served) -> None:
    text = served.reference.tokenizer.encode(PROMPTS[0])
    logprobs = _logprobs(served, text)[-1]
    candidates = [7, int(logprobs.argmax()), 0, 300]
    found, _ = endpoint.choose([Choosing(text, candidates), Choosing([5] * 254, candidates)])
    assert found.logprobs == pytest.approx(logprobs[candidates].tolist(), abs=1e-3)
    assert list(found.are_likeliest) == [False, True, False, False]


def test_of_two_tied_tokens_one_is_the_likeliest(served: Served) -> None:
    endpoint = Endpoint(served.url)
    text = next(
        tokens
        for tokens in ([number, number + 1] for number in range(3, 300))
        if int(_logprobs(served, tokens)[-1].argmax()) in TWINS
    )
    scored = endpoint.score([Scoring([*text, token], len(text)) for token in TWINS])
    assert sorted(one.are_likeliest[0] for one in scored) == [False, True]


def test_replies_are_those_of_transformers(endpoint: Endpoint, served: Served) -> None:
    tokenizer = served.reference.tokenizer
    texts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    whole = [tokenizer.decode(_greedy(served, text, 12)[len(text) :]) for text in texts]
    assert endpoint.generate([Generation(text, 12) for text in texts]) == whole
    stop = whole[0][5:7]
    assert endpoint.generate([Generation(texts[0], 12, [stop])]) == [whole[0].split(stop)[0]]


def test_conversations_are_rendered_by_the_server(served: Served) -> None:
    lm = served_lm(served.url, None, None, 8, None)
    begun = [{"role": "user", "content": "One two"}, {"role": "assistant", "content": "three"}]
    for messages, is_begun in ((begun[:1], False), (begun, True)):
        replies = []
        models: tuple[Any, ...] = (lm, served.reference)
        for model in models:
            prompt = model.apply_chat_template(messages, add_generation_prompt=not is_begun)
            settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
            replies += model.generate_until([Instance("generate_until", {}, (prompt, settings), 0)])
        assert replies[0] == replies[1] != ""


def write_suite(folder: Path, chat_template: bool, choices: bool = True) -> Suite:
    files: dict[str, list[Any]] = {
        "say": [{"prompt": f"{prompt} {i}", "answer": "a"} for i, prompt in enumerate(PROMPTS * 3)],
        "pick": [{"prompt": p, "choices": ["yes", "no one", "!"], "answer": 0} for p in PROMPTS],
    }
    for name, items in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    say = {"items": "say.jsonl", "scorer": "contains", "max_new_tokens": 8, "system": "Be brief."}
    objectives = {"say": {"tasks": [say]}}
    if choices:
        objectives["pick"] = {"tasks": [{"items": "pick.jsonl", "scorer": "choice"}]}
    suite = {
        "description": "test",
        "chat_template": chat_template,
        "holdout": 0,
        "objectives": objectives,
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return read_suite(folder / "suite.yaml")


@pytest.mark.parametrize("chat_template", [False, True])
def test_a_suite_measures_as_with_transformers(served: Served, tmp_path: Path, chat_template: bool) -> None:
    evaluator = Evaluator(write_suite(tmp_path, chat_template))
    own = evaluator.measure(served_lm(f"{served.url}/v1", None, None, 8, None), "search")
    reference = evaluator.measure(served.reference, "search")
    assert own.items.to_dict("records") == reference.items.to_dict("records")


def test_a_served_model_is_checked_as_it_is_now(served: Served, tmp_path: Path) -> None:
    suite, store = write_suite(tmp_path, True), ReplyStore(tmp_path / "store")
    options = CheckOptions(engine=EngineConfig(kind="transformers"))
    models = open_model(f"{served.url}#{Endpoint(served.url).model}"), open_model(str(served.folder))
    for n_known in (0, 12):  # of the directory's items; the server may serve another model by now
        said: list[str] = []
        found = check_models(*models, suite, options, store, said.append)
        assert found.check.flips == ()
        assert f"{served.url}#{Endpoint(served.url).model}: 12 items measured" in said
        assert f"{served.folder}: {12 - n_known} items measured" in "\n".join(said)


def test_the_server_says_why_it_refuses_a_request(served: Served) -> None:
    with pytest.raises(MergetuneError, match=r"\(400\): .*maximum") as caught:
        Endpoint(served.url).generate([Generation([5] * 300, 4)])
    assert not isinstance(caught.value, EngineError)
    with pytest.raises(MergetuneError, match="no `other`"):
        Endpoint(served.url, "other")


def test_log_likelihoods_need_a_tokenizer() -> None:
    with plain_server(lambda _: (200, {})) as url:
        lm = served_lm(url, None, None, 8, None)
    with pytest.raises(MergetuneError, match="--tokenizer"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)])


@pytest.mark.parametrize(
    "logprobs",
    [None, {"token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}, {"content": []}],
    ids=["none", "of the reply alone", "of another kind"],
)
def test_no_log_probabilities_are_never_guessed(logprobs: Any) -> None:
    with plain_server(lambda _: (200, {"choices": [{"text": "abc", "logprobs": logprobs}]})) as url:
        with pytest.raises(MergetuneError, match="`echo` with `logprobs`"):
            Endpoint(url).score(SCORING)
        with pytest.raises(MergetuneError, match="`echo` with `logprobs`"):
            Endpoint(url).choose([Choosing([5, 6], [7, 8])])


def test_a_failure_of_a_moment_is_tried_again() -> None:
    answers = iter([(503, {}), (200, {"choices": [{"text": "abc"}]})])
    with plain_server(lambda _: next(answers)) as url:
        assert Endpoint(url).generate(GENERATION) == ["abc"]


def test_the_key_is_sent_and_not_told() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if body["key"] != "Bearer right":
            return 401, {"error": {"message": "Unauthorized"}}
        return 200, {"choices": [{"text": "abc"}]}

    with plain_server(answer) as url:
        assert Endpoint(url, api_key="right").generate(GENERATION) == ["abc"]
        with pytest.raises(MergetuneError, match="API key") as caught:
            Endpoint(url, api_key="secret").generate(GENERATION)
    assert not isinstance(caught.value, EngineError)
    assert "secret" not in str(caught.value)


def test_the_key_goes_to_the_host_that_was_named_for_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body["key"])
        return 200, {"choices": [{"message": {"content": "abc"}}]}

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    evaluator = Evaluator(write_suite(tmp_path, True, choices=False))
    with plain_server(answer) as url:
        host = urlsplit(url).netloc
        named = {"example.com": None, host: "Bearer secret", "127.0.0.1": "Bearer secret"}
        for name, key in named.items():
            model = open_model(url, key_variables={name: "OPENAI_API_KEY"})
            evaluator.measure(model.start(EngineConfig(), None, None, print)[0].lm, "search")
            assert set(seen) == {key}
            seen.clear()
        with pytest.raises(MergetuneError, match="MY_KEY holds no API key"):
            open_model(url, key_variables={host: "MY_KEY"}).start(EngineConfig(), None, None, print)


def test_a_model_that_computes_nan_fails_its_trial() -> None:
    said = {"error": {"message": "Out of range float values are not JSON compliant"}}  # as vLLM 0.32
    with plain_server(lambda _: (400, said)) as url, pytest.raises(TrialError, match="NaN") as caught:
        Endpoint(url).score(SCORING)
    assert not isinstance(caught.value, EngineError)


@pytest.mark.parametrize(
    ("status", "reply", "said"),
    [
        (500, {"error": {"message": "died"}}, "500: died"),
        (200, b"<html>", "<html>"),
        (200, {"id": 1}, "choices"),
    ],
)
def test_a_broken_server_is_a_fault_and_asked_no_more(status: int, reply: Any, said: str) -> None:
    n_asked = 0

    def answer(_: dict[str, Any]) -> tuple[int, Any]:
        nonlocal n_asked
        n_asked += 1
        return status, reply

    with plain_server(answer) as url, pytest.raises(EngineError, match=said):
        Endpoint(url, concurrency=2).generate(GENERATION * 200)
    assert n_asked < 50


def test_a_hung_server_is_a_fault_after_the_time_out() -> None:
    release = threading.Event()

    def answer(_: dict[str, Any]) -> tuple[int, Any]:
        release.wait(20)
        return 200, {}

    start = time.monotonic()
    with plain_server(answer) as url:
        with pytest.raises(EngineError, match=r"within 0\.3 s"):
            Endpoint(url, concurrency=2, timeout_s=0.3).generate(GENERATION * 50)
        assert time.monotonic() - start < 5
        release.set()


def test_a_server_that_is_gone_is_a_fault() -> None:
    with plain_server(lambda _: (200, {})) as url:
        endpoint = Endpoint(url)
    with pytest.raises(EngineError, match="cannot be reached"):
        endpoint.generate(GENERATION)


def _logprobs(served: Served, tokens: list[int]) -> torch.Tensor:
    """Return the log-probabilities of what follows each token: (n_tokens, n_vocabulary)."""
    with torch.no_grad():
        logits: torch.Tensor = served.model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def _greedy(served: Served, tokens: list[int], n_new: int) -> list[int]:
    """Return the tokens with what transformers adds to them."""
    batch = served.model.generate(torch.tensor([tokens]), max_new_tokens=n_new, do_sample=False)
    text: list[int] = batch[0].tolist()
    return text
