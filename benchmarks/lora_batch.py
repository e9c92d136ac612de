"""Several candidates in one batch of one vLLM, each as a LoRA adapter, against one swap after another.

A linear merge of adapters is an adapter itself: Σ λᵢ Bᵢ Aᵢ = [λ₁B₁ … λₖBₖ] · [A₁; …; Aₖ], of the ranks'
sum, whether λ is one number or differs by layer. So a batch can hold replies of several candidates.
`engine.py --lora-batch` runs this.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergetune.engines.completions import Choosing, CompletionsLM, Generation, Scored, Scoring
from mergetune.engines.engine import EngineConfig
from mergetune.engines.model_text import ModelText
from mergetune.engines.vllm_arguments import ENVIRONMENT, engine_arguments, for_device
from mergetune.engines.vllm_engine import VllmEngine
from mergetune.evaluation.evaluate import Evaluator
from mergetune.machine.guarded_process import GuardedProcess, last_words
from mergetune.merging.inputs import Inputs
from mergetune.space.recipe import MergeRecipe, assign_groups
from mergetune.weights.adapter import CONFIG, WEIGHTS
from mergetune.weights.checkpoint import Expert

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM pads to
# All but the head: wrapped, it breaks log-probabilities of prompts (vLLM 0.32).
_MODULES = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class Replay:
    """A `Completer` that keeps what it is asked, and gives answers that were found before."""

    def __init__(self, replies: Sequence[str] = (), scored: Sequence[Scored] = ()) -> None:
        self._replies, self._scored = list(replies), list(scored)
        self.generations: list[Generation] = []
        self.scorings: list[Scoring] = []

    @property
    def logprobs(self) -> list[float]:
        """All log-probabilities that it gives."""
        return [logprob for scored in self._scored for logprob in scored.logprobs]

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """See `Completer.generate`."""
        self.generations += requests
        return self._replies or [""] * len(requests)

    def score(self, requests: Sequence[Scoring]) -> list[Scored]:
        """See `Completer.score`."""
        self.scorings += requests
        return self._scored or [Scored([0.0], [False])] * len(requests)

    def choose(self, requests: Sequence[Choosing]) -> list[Scored]:
        """See `Completer.choose`; the demo's suite asks for none."""
        assert not requests
        return []


class LoraVllm:
    """A vLLM for up to `max_loras` adapters at a time, in a process of its own."""

    def __init__(self, config: EngineConfig, base: Path, rank: int, max_loras: int, log: Path) -> None:
        max_length = ModelText.read(base, config.max_length).max_length
        arguments = engine_arguments(config, base, "bfloat16", max_length) | {
            "enable_lora": True,
            "max_lora_rank": min(each for each in _RANKS if each >= rank),
            "max_loras": max_loras,
            "lora_target_modules": _MODULES,
        }
        del arguments["worker_extension_cls"]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent)}
        self._log = log
        self._process = GuardedProcess("lora_batch:serve", arguments, log, environment)
        self._answer()  # it has started

    def run(self, requests: Sequence[Generation] | Sequence[Scoring], adapters: Sequence[Path]) -> list[Any]:
        """Answer the same requests by each adapter, all in one batch; returns each adapter's answers."""
        self._process.connection.send((list(requests), [str(adapter) for adapter in adapters]))
        answers = self._answer()
        return [answers[start : start + len(requests)] for start in range(0, len(answers), len(requests))]

    def close(self) -> None:
        """End the process."""
        self._process.kill()

    def _answer(self) -> Any:
        try:
            return self._process.connection.recv()
        except EOFError as error:
            self.close()
            raise RuntimeError(f"The vLLM with adapters ended. {last_words(self._log)}") from error


def serve(connection: Connection, arguments: Mapping[str, Any]) -> None:
    """Start vLLM, then answer each (requests, adapters) until the pipe is closed."""
    settled = for_device(arguments)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm: Any = LLM(**settled)
    connection.send("started")
    numbers = itertools.count(1)
    loras: dict[str, LoRARequest] = {}
    while True:
        requests, adapters = connection.recv()
        for adapter in adapters:
            loras.setdefault(adapter, LoRARequest(adapter, next(numbers), adapter))
        outputs = llm.generate(
            [{"prompt_token_ids": list(request.tokens)} for request in requests] * len(adapters),
            [_sampling(request) for request in requests] * len(adapters),
            lora_request=[loras[adapter] for adapter in adapters for _ in requests],
            use_tqdm=False,
        )
        pairs = zip(outputs, itertools.cycle(requests), strict=False)
        connection.send([_answer(output, request) for output, request in pairs])


def _sampling(request: Generation | Scoring) -> Any:
    from vllm import SamplingParams

    if isinstance(request, Scoring):
        return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    return SamplingParams(
        temperature=0.0,
        max_tokens=request.max_new_tokens,
        stop=list(request.stop),
        stop_token_ids=list(request.stop_tokens),
    )


def _answer(output: Any, request: Generation | Scoring) -> str | Scored:
    if isinstance(request, Generation):
        return str(output.outputs[0].text)
    pairs = list(zip(output.prompt_logprobs, request.tokens, strict=True))[request.start :]
    found = [at[token] for at, token in pairs]
    return Scored([at.logprob for at in found], [at.rank == 1 for at in found])


def write_adapter(folder: Path, recipe: MergeRecipe, inputs: Inputs) -> None:
    """Write a merge of adapters by task arithmetic as one adapter."""
    groups = assign_groups(recipe.groups, inputs.base.names)
    factors: dict[str, list[Tensor]] = defaultdict(list)
    for expert in inputs.experts:
        scale = _config(expert)["lora_alpha"] / _config(expert)["r"]
        for name, factor in load_file(expert.folder / WEIGHTS).items():
            module = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
            weight = scale * groups[f"{module}.weight"].per_expert("lambda")[expert.name]
            factors[name].append(factor.float() * weight if name.endswith(_B) else factor)
    joined = {
        name: torch.cat(parts, dim=1 if name.endswith(_B) else 0).bfloat16()
        for name, parts in factors.items()
    }
    rank = _rank(inputs)
    modules = sorted({name.split(".")[-3] for name in joined})
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    folder.mkdir()
    save_file(joined, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(about))


def _rank(inputs: Inputs) -> int:
    return sum(_config(expert)["r"] for expert in inputs.experts)


def _config(expert: Expert) -> Any:
    return json.loads((expert.folder / CONFIG).read_text())


class Comparison:
    """A vLLM that swaps, what the suite asks of a model, and one batch of LoRA candidates after another.

    Args:
        config: the options of both vLLMs; two live at a time.
        inputs: a base and LoRA experts.
        evaluator: the suite.
        folder: where adapters and logs are written.
    """

    def __init__(self, config: EngineConfig, inputs: Inputs, evaluator: Evaluator, folder: Path) -> None:
        self._config, self._inputs, self._evaluator, self._folder = config, inputs, evaluator, folder
        self._numbers = itertools.count()
        self._swap = VllmEngine(config, inputs.base.folder, inputs.paths, folder / "swap.log")
        asked = Replay()
        self._measure(asked)
        self._generations, self._scorings = asked.generations, asked.scorings

    def compare(self, recipes: Sequence[MergeRecipe], rounds: int) -> dict[str, float]:
        """Compare one batch of these candidates with as many swaps.

        `swap_s` and `lora_s` are the seconds of one candidate, medians over rounds: all replies of the
        suite, and the swap, or the writing and loading of the adapter. The differences are those of the
        last candidate, means of the items' scores and of the log-probabilities (nats) of the choices'
        tokens.
        """
        base, log = self._inputs.base.folder, self._folder / "lora.log"
        lora = LoraVllm(self._config, base, _rank(self._inputs), len(recipes), log)
        try:
            of_scores, of_logprobs = self._differences(lora, recipes[-1])  # which warms both up, too
            times = [self._round(lora, recipes) for _ in range(rounds)]
        finally:
            lora.close()
        swap_s, lora_s = (statistics.median(each) / len(recipes) for each in zip(*times, strict=True))
        return {
            "n_candidates": len(recipes),
            "swap_s": swap_s,
            "lora_s": lora_s,
            "score_difference": of_scores,
            "logprob_difference": of_logprobs,
        }

    def close(self) -> None:
        """End the vLLM that swaps."""
        self._swap.close()

    def _round(self, lora: LoraVllm, recipes: Sequence[MergeRecipe]) -> tuple[float, float]:
        """Time the candidates by swaps, and in one batch."""
        start = time.perf_counter()
        for recipe in recipes:
            self._swap.load(recipe)
            self._swap.vllm.generate(self._generations)
        swapped = time.perf_counter()
        lora.run(self._generations, [self._write(recipe) for recipe in recipes])
        found = swapped - start, time.perf_counter() - swapped
        print(f"{len(recipes)} candidates: swaps {found[0]:.2f} s, LoRA {found[1]:.2f} s", flush=True)
        return found

    def _differences(self, lora: LoraVllm, recipe: MergeRecipe) -> tuple[float, float]:
        """Return how far the scores and log-probabilities of a candidate differ, in the mean."""
        self._swap.load(recipe)
        adapter = [self._write(recipe)]
        (replies,), (scored,) = lora.run(self._generations, adapter), lora.run(self._scorings, adapter)
        ours = Replay(self._swap.vllm.generate(self._generations), self._swap.vllm.score(self._scorings))
        theirs = Replay(replies, scored)
        scores = (self._measure(ours) - self._measure(theirs)).abs().mean()
        pairs = zip(ours.logprobs, theirs.logprobs, strict=True)
        return float(scores), statistics.fmean(abs(one - other) for one, other in pairs)

    def _measure(self, replay: Replay) -> Any:
        """Return the items' scores."""
        lm: Any = self._swap.lm
        found = self._evaluator.measure(CompletionsLM(replay, lm.tokenizer, lm.max_length), "search")
        return found.items["score"]

    def _write(self, recipe: MergeRecipe) -> Path:
        """Write an adapter to a place of its own: vLLM keeps what it computed by the path."""
        folder = self._folder / f"adapter-{next(self._numbers)}"
        write_adapter(folder, recipe, self._inputs)
        return folder
