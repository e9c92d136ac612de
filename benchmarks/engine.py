"""Where the time of a candidate goes: in a living vLLM, in one started for it, and in transformers.

    python benchmarks/engine.py                      # on the device that the engines choose
    python benchmarks/engine.py --compiled           # vLLM compiles the model

The same candidates of the demo (SmolLM2-135M and its two experts, the search split of its suite) are
measured in three ways that take turns in one run:

- `swap`: as a study does it: the candidate is merged inside a living vLLM;
- `restart`: as tools do that keep no engine: it is written to disk, and vLLM started on it;
- `transformers`: as a study does it with that engine.

`inference_s` is the time inside the model: vLLM's answers, or the forward passes and generation of
transformers. `overhead_s` is the rest of the evaluation. The figures are medians over candidates;
`swap` and `transformers` measure one more before, which does not count. Let nothing else run: with
its cores taken, vLLM on a CPU is many times slower.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mergetune.engines.engine import Engine, EngineConfig
from mergetune.engines.start import start_engine
from mergetune.engines.transformers_engine import TransformersEngine
from mergetune.engines.vllm_engine import VllmEngine
from mergetune.evaluation.evaluate import Evaluator, Measurement
from mergetune.evaluation.suite import Suite, SuiteConfig, read_suite
from mergetune.files.library import find, shared_folder
from mergetune.merging.inputs import Inputs, open_inputs
from mergetune.space.recipe import MergeRecipe
from mergetune.study.export import write_merged
from mergetune.weights.chat_template import ChatTemplate, choose_template
from mergetune.weights.models import demo_model

# Two vLLMs live at a time, `swap` and `restart`, so each takes less than a study's would.
_VLLM = EngineConfig(kind="vllm", gpu_memory_utilization=0.3, kv_cache_gib=2)
_TRANSFORMERS = EngineConfig(kind="transformers", batch_size=50)
_INFERENCE = ("generate", "score", "choose")  # of a `Completer`
_TARGETS = {"inference share of swap": 0.9, "overhead share of swap": 0.05, "restart / swap": 15.0}


@dataclass(frozen=True)
class Times:
    """Where the seconds of one candidate went."""

    merge_s: float
    load_s: float
    inference_s: float
    overhead_s: float

    @property
    def total_s(self) -> float:
        """The whole candidate."""
        return self.merge_s + self.load_s + self.inference_s + self.overhead_s


Way = Callable[[MergeRecipe], tuple[Times, Measurement]]


class Stopwatch:
    """Adds up the time inside the methods that it is put around."""

    def __init__(self, target: object, methods: Sequence[str]) -> None:
        self.seconds = 0.0
        for name in methods:
            setattr(target, name, self._around(getattr(target, name)))

    def _around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                result = method(*arguments, **keywords)
                if torch.cuda.is_available():  # the model's passes are only begun
                    torch.cuda.synchronize()
                return result
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def candidates(inputs: Inputs, count: int) -> list[MergeRecipe]:
    """Draw merges whose lambdas differ between experts, and between attention and the rest."""
    draw = random.Random(0)
    roles = {"attention": ["attention"], "rest": ["mlp", "norms", "embeddings", "head"]}
    return [
        MergeRecipe.model_validate(
            {
                "method": "task_arithmetic",
                "base": inputs.base_source,
                "experts": inputs.expert_sources,
                "groups": [
                    {
                        "name": name,
                        "roles": taken,
                        "lambda": {expert: draw.uniform(0.3, 0.9) for expert in inputs.expert_sources},
                    }
                    for name, taken in roles.items()
                ],
            }
        )
        for _ in range(count)
    ]


def limited(suite: Suite, limit: int | None) -> Suite:
    """Return a suite of the first items of every task."""
    if limit is None:
        return suite
    config = suite.config.model_dump()
    for score in (*config["objectives"].values(), *config["guards"].values()):
        for task in score["tasks"]:
            task["limit"] = limit
    return replace(suite, config=SuiteConfig.model_validate(config))


def swapped(engine: Engine, watch: Stopwatch, evaluator: Evaluator) -> Way:
    """Measure candidates in a living engine."""

    def measure(recipe: MergeRecipe) -> tuple[Times, Measurement]:
        start = time.perf_counter()
        merge_s = engine.load(recipe).merge_s
        load_s = time.perf_counter() - start - merge_s
        return _evaluated(engine, watch, evaluator, merge_s, load_s)

    return measure


def restarted(
    config: EngineConfig, inputs: Inputs, chat: ChatTemplate | None, folder: Path, evaluator: Evaluator
) -> Way:
    """Measure candidates each in an engine of its own, started on a model on disk."""

    def measure(recipe: MergeRecipe) -> tuple[Times, Measurement]:
        start = time.perf_counter()
        write_merged(folder / "candidate", recipe, inputs)  # one place: what vLLM compiled is found again
        written = time.perf_counter()
        engine = VllmEngine(config, folder / "candidate", None, folder / "restart.log", chat)
        load_s = time.perf_counter() - written
        try:
            watch = Stopwatch(engine.vllm, _INFERENCE)
            return _evaluated(engine, watch, evaluator, written - start, load_s)
        finally:
            engine.close()

    return measure


def _evaluated(
    engine: Engine, watch: Stopwatch, evaluator: Evaluator, merge_s: float, load_s: float
) -> tuple[Times, Measurement]:
    watch.seconds = 0.0
    found = evaluator.measure(engine.lm, "search")
    return Times(merge_s, load_s, watch.seconds, found.seconds - watch.seconds), found


def compare_ways(
    config: EngineConfig,
    inputs: Inputs,
    chat: ChatTemplate | None,
    evaluator: Evaluator,
    count: int,
    folder: Path,
) -> tuple[dict[str, Times], dict[str, Any]]:
    """Measure the candidates in every way, in turn; returns medians, and facts beside them."""
    warm_up, *recipes = candidates(inputs, count + 1)
    start = time.perf_counter()
    vllm = start_engine(config, inputs.base.folder, inputs, chat=chat)
    start_s = time.perf_counter() - start
    assert isinstance(vllm, VllmEngine)
    hf = start_engine(_TRANSFORMERS, inputs.base.folder, inputs, chat=chat)
    assert isinstance(hf, TransformersEngine)
    try:
        ways = {
            "swap": swapped(vllm, Stopwatch(vllm.vllm, _INFERENCE), evaluator),
            "restart": restarted(config, inputs, chat, folder, evaluator),
            "transformers": swapped(hf, Stopwatch(hf.completer, _INFERENCE), evaluator),
        }
        for way in ("swap", "transformers"):
            ways[way](warm_up)
        found = [{way: _told(way, measure(recipe)) for way, measure in ways.items()} for recipe in recipes]
    finally:
        vllm.close()
        hf.close()
    medians = {way: _median([turn[way][0] for turn in found]) for way in ways}
    facts = {
        "n_candidates": count,
        "n_items": len(found[0]["swap"][1].items),
        "start_s": start_s,
        "load_average": os.getloadavg(),
        "every_candidate": {way: [asdict(turn[way][0]) for turn in found] for way in ways},
        "differing_scores_swap_restart": max(
            _count_differing(turn["swap"][1], turn["restart"][1]) for turn in found
        ),
    }
    return medians, facts


def _told(way: str, found: tuple[Times, Measurement]) -> tuple[Times, Measurement]:
    """Show that the benchmark goes on, and whether the machine is quiet."""
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in asdict(found[0]).items())
    print(f"{way}: {seconds}; load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def _median(times: Sequence[Times]) -> Times:
    return Times(
        **{each.name: statistics.median(getattr(t, each.name) for t in times) for each in fields(Times)}
    )


def _count_differing(one: Measurement, other: Measurement) -> int:
    """Count the items that two measurements of the same model score differently."""
    return int((one.items["score"] != other.items["score"]).sum())


def shares(found: Mapping[str, Times]) -> dict[str, float]:
    """Return what the targets are for."""
    swap, restart = found["swap"], found["restart"]
    return {
        "inference share of swap": swap.inference_s / swap.total_s,
        "overhead share of swap": swap.overhead_s / swap.total_s,
        "restart / swap": (restart.merge_s + restart.load_s) / (swap.merge_s + swap.load_s),
    }


def show(found: Mapping[str, Times], console: Console) -> None:
    """Print the seconds of a candidate in each way, and how the targets fare."""
    columns = ("merge", "load", "inference", "overhead", "sum", "inference / sum", "an hour")
    table = Table("seconds", *columns)
    for way, times in found.items():
        table.add_row(
            way,
            *(f"{each:.2f}" for each in (*asdict(times).values(), times.total_s)),
            f"{times.inference_s / times.total_s:.1%}",
            f"{3600 / times.total_s:.0f}",
        )
    console.print(table)
    for what, value in shares(found).items():
        target = _TARGETS[what]
        is_met = value < target if what.startswith("overhead") else value >= target
        console.print(f"{what}: {value:.3g} (target {target:g}, {'met' if is_met else 'missed'})")


def main() -> None:
    """Measure and print; `--json` writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=int, default=3, help="measured in every way")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile; the default on a GPU")
    parser.add_argument("--limit", type=int, help="take the first items of every task only")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    config = _VLLM.model_copy(update={"enforce_eager": False if arguments.compiled else None})
    experts = shared_folder("examples") / "taskmaster" / "experts"
    inputs = open_inputs(demo_model(), {name: experts / name for name in ("tools", "persona")})
    suite = limited(read_suite(find("evals", "taskmaster", Path())), arguments.limit)
    chat = choose_template(inputs.base.folder, suite.config.chat_template)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        found, facts = compare_ways(
            config, inputs, chat, Evaluator(suite), arguments.candidates, Path(folder)
        )
    show(found, console)
    written = {way: asdict(times) for way, times in found.items()} | {"facts": facts}
    if arguments.json:
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
