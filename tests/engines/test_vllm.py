"""vLLM, really run: it scores as transformers does, follows every swap, and survives its own death."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import psutil
import pytest
import torch
from lm_eval.api.instance import Instance
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import build_llama, fine_tune, plain_loop, wait_until_gone
from mergetune.engines.completions import Scoring
from mergetune.engines.engine import Engine, EngineConfig
from mergetune.engines.self_test import RECORD
from mergetune.engines.start import start_engine
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.vllm_engine import VllmEngine
from mergetune.errors import MergetuneError, TrialError
from mergetune.evaluation.evaluate import ITEM_KEYS, Evaluator
from mergetune.evaluation.suite import read_suite
from mergetune.files.library import find, shared_folder
from mergetune.measuring.model_under_test import LocalModel
from mergetune.measuring.pool import Job, Measured, Pool
from mergetune.measuring.progress import Progress
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.results.run_dir import RunDir
from mergetune.space.method_table import MethodName
from mergetune.space.recipe import MergeRecipe
from mergetune.space.stack import Stack
from mergetune.study.candidates import Candidates, Proposal
from mergetune.weights.models import demo_model, find_model
from studies import write_study

pytest.importorskip("vllm")

SMALL: dict[str, Any] = {"max_length": 256, "kv_cache_gib": 0.05}
CONTEXTS = (
    "What is the capital of France?",
    "One two three four",
    "<|im_start|>user\nSay yes or no.<|im_end|>\n<|im_start|>assistant\n",
    "Call the tool",
)
CONTINUATIONS = (" The capital of France is Paris.", " five six seven", "Yes", "{")


def recipe_of(inputs: Inputs, *lambdas: float, method: MethodName = "task_arithmetic") -> MergeRecipe:
    given: dict[str, Any] = {"lambda": dict(zip(inputs.expert_sources, lambdas, strict=True))}
    if method == "dare_ties":
        given["density"] = dict.fromkeys(inputs.expert_sources, 0.6)
    return MergeRecipe.of_one_group(method, inputs.base_source, inputs.expert_sources, given)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def loglikelihoods(engine: Engine, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = engine.lm.loglikelihood(instances("loglikelihood", pairs))
    return found


def rolling(engine: Engine, texts: list[str]) -> list[float]:
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    found: list[float] = engine.lm.loglikelihood_rolling(requests)
    return found


def replies(engine: Engine, **settings: Any) -> list[str]:
    arguments = [(context, {"until": [], "do_sample": False, **settings}) for context in CONTEXTS]
    found: list[str] = engine.lm.generate_until(instances("generate_until", arguments))
    return [reply.rstrip("\ufffd") for reply in found]  # vLLM leaves out half a character at the end


@dataclass
class Pair:
    """The same models in both engines."""

    inputs: Inputs
    vllm: VllmEngine
    plain: Engine
    record: dict[str, Any]

    def load(self, *lambdas: float) -> None:
        for engine in (self.vllm, self.plain):
            engine.load(recipe_of(self.inputs, *lambdas))


def start_pair(inputs: Inputs, folder: Path, **options: Any) -> Pair:
    base = inputs.base.folder
    same = {name: options[name] for name in ("dtype", "max_length") if name in options}
    vllm = start_engine(EngineConfig(kind="vllm", **options), base, inputs, folder)
    assert isinstance(vllm, VllmEngine)
    plain = start_engine(EngineConfig(kind="transformers", device="cpu", **same), base, inputs)
    return Pair(inputs, vllm, plain, json.loads((folder / RECORD).read_text()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two experts that say other things; vLLM's attention takes heads of 32 on a CPU."""
    folder = tmp_path_factory.mktemp("models")
    base = build_llama(folder / "base", head_dim=32)
    return {"base": base} | {
        name: fine_tune(base, folder / name, seed, std=0.2) for seed, name in enumerate("ab", start=1)
    }


def open_models(models: dict[str, Path]) -> Inputs:
    return open_inputs(models["base"], {name: models[name] for name in "ab"})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Iterator[Pair]:
    """The tiny Llama in float32."""
    pair = start_pair(open_models(models), tmp_path_factory.mktemp("tiny"), dtype="float32", **SMALL)
    yield pair
    pair.vllm.close()


FORGETFUL = """
from mergetune.engines.vllm_worker import MergeWorker

class Forgetful(MergeWorker):
    def _mergetune_renew_tied_head(self):
        pass
"""


def test_a_swap_that_does_not_reach_a_weight_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, vLLM's head is a packed copy of the embeddings that its own reload leaves as it was."""
    base = build_llama(tmp_path / "base", head_dim=32, tie_word_embeddings=True)
    expert = fine_tune(base, tmp_path / "expert", 1, std=0.2)
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    arguments = {"worker_extension_cls": "forgetful.Forgetful"}
    config = EngineConfig(kind="vllm", dtype="float32", arguments=arguments, **SMALL)
    with pytest.raises(MergetuneError, match="does not compute with the weights that are put in"):
        start_engine(config, base, open_inputs(base, {"expert": expert}), tmp_path)
    assert not (tmp_path / RECORD).exists()


# Says which bits vLLM copies into the model: of tensors merged where they are copied, then of merged ones.
WATCHFUL = """
import hashlib
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from mergetune.engines.vllm_worker import MergeWorker
from mergetune.space.method_table import MethodName
from mergetune.space.recipe import MergeRecipe

class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = hashlib.sha256()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and not args[0].is_meta and args[0].numel():
            self.seen.update(args[0].contiguous().view(torch.uint8).numpy())
        return found

class Watchful(MergeWorker):
    def mergetune_load(self, recipe, progress):
        with Copies() as whole:
            merge = self.mergetune_merger.start(MergeRecipe.model_validate_json(recipe))
            names = self.mergetune_merger.base.names
            self.reload_weights(weights_iterator=((name, merge.tensor(name)) for name in names))
        with Copies() as parts:
            answer = super().mergetune_load(recipe, progress)
        return {**answer, "whole": whole.seen.hexdigest(), "parts": parts.seen.hexdigest()}
"""


def test_two_ranks_merge_once_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each merges what its part of the model takes, with the bits of a whole merge; what one finds counts."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("each rank takes a core")
    base = build_llama(tmp_path / "base", head_dim=32, tie_word_embeddings=True)
    experts = {name: fine_tune(base, tmp_path / name, seed, std=0.2) for seed, name in enumerate("ab", 1)}
    inputs = open_inputs(base, {**experts, "far": with_last_row_moved(base, tmp_path / "far")})
    (tmp_path / "watchful.py").write_text(WATCHFUL)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    arguments = {"worker_extension_cls": "watchful.Watchful"}
    config = EngineConfig(kind="vllm", dtype="float32", tensor_parallel_size=2, arguments=arguments, **SMALL)
    plain = start_engine(EngineConfig(kind="transformers", device="cpu", dtype="float32"), base, inputs)
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    with closing(VllmEngine(config, base, inputs.paths, tmp_path / "engine.log")) as engine:
        for method in ("task_arithmetic", "dare_ties"):
            wanted = recipe_of(inputs, 0.4, 0.8, 0.0, method=method)
            answers = engine.vllm.load(wanted.model_dump_json(by_alias=True))
            assert all(answer["parts"] == answer["whole"] for answer in answers)
            assert answers[0]["parts"] != answers[1]["parts"]
            whole = inputs.merger.start(wanted)
            for name in inputs.base.names:
                whole.tensor(name)
            assert sum(answer["read_bytes"] for answer in answers) <= 1.3 * whole.read_bytes
            with pytest.raises(TrialError, match=r"makes .*gate_proj.* infinite or NaN") as told:
                engine.load(recipe_of(inputs, 0.4, 0.8, 1e38))
            assert told.type is TrialError  # the engine lives
            for each in (engine, plain):
                each.load(wanted)
            ours, theirs = (loglikelihoods(each, pairs) for each in (engine, plain))
            assert [a[0] for a in ours] == pytest.approx([b[0] for b in theirs], abs=2e-3)


def with_last_row_moved(base: Path, folder: Path) -> Path:
    """Save a model that differs from the base where the last rank alone holds it."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[-1] += 8
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_stack_is_read_where_its_weights_are(tmp_path: Path, models: dict[str, Path]) -> None:
    slots = [(0, 2), (0, 2), (1, 2)]
    folders = {
        name: find_model(
            Stack.model_validate({"stack": [{"model": name, "layers": each} for each in slots]}), path
        )
        for name, path in ((name, folder.parent) for name, folder in models.items())
    }
    pair = start_pair(open_models(folders), tmp_path, dtype="float32", **SMALL)
    try:
        assert pair.record["base_to_base_from_disk"] < 1e-4
        for lambdas in ((0.0, 0.0), (0.4, 0.8)):
            pair.load(*lambdas)
            pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
            vllm, plain = (loglikelihoods(engine, pairs) for engine in (pair.vllm, pair.plain))
            assert [each[0] for each in vllm] == pytest.approx([each[0] for each in plain], abs=1e-3)
    finally:
        pair.vllm.close()


class TestTiny:
    def test_the_self_test_is_on_record(self, tiny: Pair) -> None:
        assert tiny.record["base_to_base_from_disk"] < 1e-4
        assert tiny.record["base_again_to_base_from_disk"] < 1e-4
        assert tiny.record["base_to_other"] > 0.01

    @pytest.mark.parametrize("lambdas", [(0.0, 0.0), (1.0, 0.0), (0.4, 0.8)])
    def test_a_swapped_candidate_scores_as_in_transformers(
        self, tiny: Pair, lambdas: tuple[float, float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny.load(*lambdas)
        pairs = [
            *((context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS),
            *((CONTEXTS[0], letter) for letter in "abcdefgh"),  # single tokens after one context
            ("", "One two three"),
            ("One two three " * 150, "four five six"),  # longer than the model
        ]
        for engine in (tiny.vllm, tiny.plain):
            monkeypatch.setattr(engine.lm, "truncate", "left")
        ours, theirs = (loglikelihoods(engine, pairs) for engine in (tiny.vllm, tiny.plain))
        assert [a[0] for a in ours] == pytest.approx([b[0] for b in theirs], abs=2e-3)
        assert [a[1] for a in ours] == [b[1] for b in theirs]

    def test_what_is_greedy_is_known_exactly(self, tiny: Pair) -> None:
        tiny.load(1.0, 0.0)
        said = replies(tiny.plain, max_gen_toks=8)
        pairs = [(context, reply) for context, reply in zip(CONTEXTS, said, strict=True) if reply.strip()]
        assert pairs
        ours, theirs = (loglikelihoods(engine, pairs) for engine in (tiny.vllm, tiny.plain))
        assert [a[1] for a in ours] == [b[1] for b in theirs]

    def test_rolling_scores_are_those_of_transformers(self, tiny: Pair) -> None:
        tiny.load(0.4, 0.8)
        texts = list(CONTEXTS)
        assert rolling(tiny.vllm, texts) == pytest.approx(rolling(tiny.plain, texts), abs=5e-3)
        long = "One two three four five. " * 60  # several windows
        n_tokens = len(tiny.vllm.lm.tokenizer.encode(long))
        assert n_tokens > 256
        assert rolling(tiny.vllm, [long])[0] / n_tokens == pytest.approx(
            rolling(tiny.plain, [long])[0] / n_tokens, abs=0.05
        )

    def test_greedy_replies_are_equal_and_end_at_stops(self, tiny: Pair) -> None:
        tiny.load(0.4, 0.8)
        ours, theirs = (replies(engine, max_gen_toks=20) for engine in (tiny.vllm, tiny.plain))
        assert ours == theirs
        middle = ours[0][len(ours[0]) // 2]
        stopped, wanted = (
            replies(engine, max_gen_toks=20, until=[middle, "<|im_end|>"])
            for engine in (tiny.vllm, tiny.plain)
        )
        assert stopped == wanted
        assert stopped[0] == ours[0].split(middle)[0]

    @pytest.mark.parametrize("split", ["all", "search", "holdout"])
    def test_the_table_of_a_suite_is_that_of_a_plain_loop(
        self, tiny: Pair, tmp_path: Path, split: Literal["all", "search", "holdout"]
    ) -> None:
        tiny.load(1.0, 0.0)
        assert isinstance(tiny.plain, TransformersEngine)
        prompts = [f"Count {'on ' * (i % 4)}from {i}:" for i in range(16)]
        choices = [" Yes", " no, never"]
        said, likeliest = plain_loop(tiny.plain.model, tiny.vllm.lm.tokenizer, prompts, choices, 6)
        rows: dict[str, list[dict[str, Any]]] = {
            "say": [{"prompt": prompt, "answer": f"{i}"} for i, prompt in enumerate(prompts)],
            "pick": [{"prompt": prompt, "choices": ["Yes", "no, never"], "answer": 0} for prompt in prompts],
        }
        for name, own in rows.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in own))
        suite = {
            "description": "x",
            "chat_template": False,
            "holdout": 0.5,
            "objectives": {
                "say": {"tasks": [{"items": "say.jsonl", "scorer": "contains", "max_new_tokens": 6}]},
                "pick": {"tasks": [{"items": "pick.jsonl", "scorer": "choice"}]},
            },
        }
        (tmp_path / "suite.yaml").write_text(json.dumps(suite))
        evaluator = Evaluator(read_suite(tmp_path / "suite.yaml"))
        found = evaluator.measure_documents(tiny.vllm.lm, evaluator.documents(split)).items
        table = found.merge(evaluator.items(), on=ITEM_KEYS, validate="one_to_one")
        assert len(table) == len(found) == sum(map(len, evaluator.documents(split).values()))
        for row in table.to_dict("records"):
            i = prompts.index(row["prompt"])
            if row["score_name"] == "pick":
                assert row["score"] == float(likeliest[i] == 0)
            else:
                assert row["response"].rstrip("\ufffd") == said[i].rstrip("\ufffd")
                assert row["score"] == float(str(i) in said[i])

    def test_sampling_obeys_its_settings_and_repeats(self, tiny: Pair) -> None:
        def draw(**settings: float) -> list[str]:
            return replies(tiny.vllm, max_gen_toks=12, do_sample=True, **settings)

        hot = draw(temperature=1.9)
        assert hot != replies(tiny.vllm, max_gen_toks=12)
        assert hot == draw(temperature=1.9)
        assert draw(temperature=1.0, top_k=1) == replies(tiny.vllm, max_gen_toks=12)

    def test_a_draw_depends_on_its_seed_and_not_on_the_batch(self, tiny: Pair) -> None:
        how = {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
        asked = instances("generate_until", [(CONTEXTS[0], {**how, "seed": seed}) for seed in range(8)])
        together = tiny.vllm.lm.generate_until(asked)
        assert len(set(together)) > 4
        assert together[:3] == [tiny.vllm.lm.generate_until([each])[0] for each in asked[:3]]

    def test_long_replies_take_longer_than_short_ones(self, tiny: Pair) -> None:
        def seconds(max_gen_toks: int) -> float:
            how = {"until": [], "do_sample": False, "max_gen_toks": max_gen_toks}
            asked = instances("reply_seconds", [(context, how) for context in CONTEXTS])
            found: list[float] = tiny.vllm.lm.reply_seconds(asked)
            return sum(found)

        assert 0 < 3 * seconds(2) < seconds(100)

    def test_a_point_that_cannot_be_merged_leaves_the_engine_whole(self, tiny: Pair) -> None:
        tiny.load(1.0, 1.0)
        pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
        before = [score for score, _ in loglikelihoods(tiny.vllm, pairs)]
        with pytest.raises(TrialError, match="infinite or NaN"):
            tiny.vllm.load(recipe_of(tiny.inputs, 3e38, 3e38))
        tiny.load(1.0, 1.0)
        assert [score for score, _ in loglikelihoods(tiny.vllm, pairs)] == pytest.approx(before)

    def test_the_time_of_a_swap_is_told_apart(self, tiny: Pair) -> None:
        time = tiny.vllm.load(recipe_of(tiny.inputs, 0.5, 0.5))
        assert time.merge_s > 0
        assert time.load_s > 0


def test_tied_embeddings_follow_a_swap(tmp_path: Path) -> None:
    base = build_llama(tmp_path / "base", head_dim=32, tie_word_embeddings=True)
    expert = fine_tune(base, tmp_path / "expert", seed=3, std=0.2)
    pair = start_pair(open_inputs(base, {"a": expert}), tmp_path, dtype="float32", **SMALL)
    try:
        assert pair.record["base_to_base_from_disk"] < 1e-4
        pair.load(1.0)
        pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
        ours, theirs = (loglikelihoods(engine, pairs) for engine in (pair.vllm, pair.plain))
        assert [a[0] for a in ours] == pytest.approx([b[0] for b in theirs], abs=2e-3)
    finally:
        pair.vllm.close()


def rows_of(task: str, count: int) -> list[dict[str, Any]]:
    items = shared_folder("evals") / "taskmaster" / f"{task}.jsonl"
    return [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()[:count]]


def token_logprobs(engine: Engine, texts: list[list[int]]) -> torch.Tensor:
    """Score the tokens of texts by the transformers model itself."""
    assert isinstance(engine, TransformersEngine)
    model = engine.model
    found = []
    for tokens in map(torch.tensor, texts):
        with torch.no_grad():
            logprobs = model(tokens[None, :-1]).logits[0].float().log_softmax(dim=-1)
        found.append(logprobs.gather(1, tokens[1:, None])[:, 0])
    return torch.cat(found)


def test_a_real_model_with_adapters_is_as_exact_as_in_transformers(tmp_path: Path) -> None:
    """In bfloat16 rounding alone moves a log-probability by 0.07 nats in the mean, in either engine."""
    experts = shared_folder("examples") / "taskmaster" / "experts"
    inputs = open_inputs(demo_model(), {name: experts / name for name in ("tools", "persona")})
    pair = start_pair(inputs, tmp_path, max_length=1024, kv_cache_gib=1.0)
    try:
        pair.load(0.6, 0.9)
        tokenizer = pair.vllm.lm.tokenizer
        texts = [
            *(tokenizer.encode(json.dumps(row["messages"])) for row in rows_of("tool_calls", 12)),
            *(tokenizer.encode(f"{row['prompt']} {row['choices'][0]}") for row in rows_of("general", 12)),
        ]
        config = EngineConfig(kind="transformers", device="cpu", dtype="float32")
        exact = start_engine(config, inputs.base.folder, inputs)
        exact.load(recipe_of(inputs, 0.6, 0.9))
        wanted = token_logprobs(exact, texts)
        scored = pair.vllm.vllm.score([Scoring(tokens, 1) for tokens in texts])
        ours = torch.tensor([logprob for each in scored for logprob in each.logprobs])
        our_error, their_error = (
            (found - wanted).abs().mean() for found in (ours, token_logprobs(pair.plain, texts))
        )
        assert our_error < 1.25 * their_error
        assert (ours - wanted).abs().median() < 0.05

        rows = rows_of("general", 24)
        pairs = [(row["prompt"], f" {choice}") for row in rows for choice in row["choices"]]
        choices: list[list[int]] = []
        for engine in (pair.vllm, pair.plain):
            left = iter(score for score, _ in loglikelihoods(engine, pairs))
            scores = [[next(left) for _ in row["choices"]] for row in rows]
            choices.append([own.index(max(own)) for own in scores])
        assert choices[0] == choices[1]
    finally:
        pair.vllm.close()


# What goes wrong


@pytest.fixture
def evaluator(tmp_path: Path, models: dict[str, Path]) -> Evaluator:
    """A suite that takes vLLM some seconds for each model."""
    write_study(tmp_path, models["base"], {})
    words = [{"prompt": f"Say {i}.", "patterns": ["e"]} for i in range(400)]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps(item) for item in words))
    text = (tmp_path / "suite.yaml").read_text().replace("max_new_tokens: 6", "max_new_tokens: 200")
    (tmp_path / "suite.yaml").write_text(text)
    return Evaluator(read_suite(find("evals", str(tmp_path / "suite.yaml"), tmp_path)))


@pytest.fixture
def open_candidates(
    tmp_path: Path, models: dict[str, Path], evaluator: Evaluator
) -> Iterator[Callable[..., Candidates]]:
    """Candidates that take vLLM some seconds each."""
    opened: list[Candidates] = []
    inputs = open_models(models)

    def start(**options: Any) -> Candidates:
        run = RunDir(tmp_path / "run")
        (run.path / "candidates").mkdir(parents=True, exist_ok=True)
        config = EngineConfig(kind="vllm", dtype="float32", **(SMALL | options))
        console = Console(file=(tmp_path / "said").open("a"), width=500)
        opened.append(Candidates(config, inputs, evaluator, run, Progress(console)))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def pid_of(candidates: Candidates) -> int:
    engine: Any = candidates.pool.engine
    pid: int = engine.vllm._process.pid
    return pid


def while_it_measures(candidates: Candidates, what: signal.Signals, times: int) -> threading.Thread:
    """Send a signal to each of the next engines while it measures for two seconds or more."""

    def send() -> None:
        for _ in range(times):
            engine = candidates.pool.engine
            time.sleep(0.5)
            os.kill(pid_of(candidates), what)
            while candidates.pool.engine in (engine, None):
                time.sleep(0.05)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_an_engine_that_dies_or_hangs_is_replaced_and_the_candidate_tried_again(
    open_candidates: Callable[..., Candidates], tmp_path: Path
) -> None:
    living = open_candidates(timeout_s=5)
    pids = [pid_of(living)]

    # dies once: the candidate is measured all the same
    while_it_measures(living, signal.SIGKILL, times=1)
    candidate = living.measure(Proposal("trial", "trial-0001", recipe_of(living.inputs, 0.1, 0.2)))
    assert candidate.state == "complete"
    assert len(candidate.faults) == 1
    assert "killed by SIGKILL" in candidate.faults[0]
    assert "trial-0001       failed: vLLM's process ended" in (tmp_path / "said").read_text()
    wait_until_gone(pids[-1])
    pids.append(pid_of(living))

    # hangs twice: the candidate has failed, and the study goes on
    while_it_measures(living, signal.SIGSTOP, times=2)
    candidate = living.measure(Proposal("trial", "trial-0002", recipe_of(living.inputs, 0.3, 0.2)))
    assert candidate.state == "failed"
    assert candidate.reason is not None
    assert "silent for 5 s" in candidate.reason
    on_disk = living.run.candidate("trial-0002")
    assert on_disk is not None
    assert on_disk.reason == candidate.reason
    wait_until_gone(pids[-1])
    assert living.measure(Proposal("trial", "trial-0003", recipe_of(living.inputs, 0.2, 0.2))).faults == ()
    pids.append(pid_of(living))

    # makes room for slopes, and comes back when it is needed
    with living.pool.transformers() as lent:
        wait_until_gone(pids[-1])
        assert lent.model.device.type in ("cpu", "cuda")
    recipe = MergeRecipe.of_base(living.inputs.base_source, living.inputs.expert_sources)
    candidate = living.measure(Proposal("trial", "trial-0004", recipe))
    assert (candidate.state, candidate.faults) == ("complete", ())
    pids.append(pid_of(living))
    living.close()
    wait_until_gone(*pids)


def test_two_workers_score_as_one_engine_and_a_dead_vllm_in_one_is_replaced(
    tmp_path: Path, models: dict[str, Path], evaluator: Evaluator
) -> None:
    inputs = open_models(models)
    documents = {task: own[:100] for task, own in evaluator.documents("search").items()}
    jobs = [Job(f"test-{i}", documents, recipe_of(inputs, i / 10, 0.2)) for i in range(3)]

    def measured(n_workers: int | None, meanwhile: Callable[[], object]) -> dict[str, Measured]:
        config = EngineConfig(kind="vllm", dtype="float32", workers=n_workers, **SMALL)
        with closing(Pool(LocalModel.base_of(inputs), config, evaluator, None)) as pool:
            pool.start()
            for job in jobs:
                pool.submit(job)
            thread = threading.Thread(target=meanwhile, daemon=True)
            thread.start()
            found = [pool.next() for _ in jobs]
        assert all(isinstance(each, Measured) for each in found)
        return {each.job.purpose: each for each in found if isinstance(each, Measured)}

    def kill_one() -> None:
        while not (busy := [each for each in ray_actors() if "reply" in each.cmdline()[0]]):
            time.sleep(0.05)
        time.sleep(0.5)
        (vllm,) = (each for each in busy[0].children() if "mergetune" in " ".join(each.cmdline()))
        vllm.kill()

    plain, spread = measured(None, lambda: None), measured(2, kill_one)
    faults = [fault for each in spread.values() for fault in each.faults]
    assert len(faults) == 1
    assert "killed by SIGKILL" in faults[0]
    for purpose, each in plain.items():
        pd.testing.assert_frame_equal(spread[purpose].measurement.items, each.measurement.items)
    assert not ray_actors()


def ray_actors() -> list[psutil.Process]:
    """Return the processes of the workers; Ray names each by what it is doing."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::EngineHost"):
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"max_nun_seqs": 3}}, "max_nun_seqs"),
        ({"kv_cache_gib": 1e6}, "memory"),
    ],
)
def test_an_engine_that_cannot_start_says_why(
    tmp_path: Path, models: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MergetuneError, match=message):
        start_engine(EngineConfig(kind="vllm", **(SMALL | options)), models["base"], None, tmp_path)
