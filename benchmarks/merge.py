"""How fast candidates are merged: against a plain copy of the same bytes, and against mergekit.

    python benchmarks/merge.py                          # SmolLM2-135M and the demo's two experts, made full
    python benchmarks/merge.py --parameters 1e9         # a synthetic Llama of that size, in memory
    python benchmarks/merge.py --parameters 3e7 --experts 2 8 9 30 --methods all
    python benchmarks/merge.py --parameters 5e8 --adapters 16 64    # two adapters of these ranks
    python benchmarks/merge.py --device cuda            # 8B synthetic parameters on the card

A merge of n experts reads n + 1 models and writes one; DELLA reads ranks of two bytes, too. The floor is
the time in which `copy_` moves the same bytes, read and written together, between two blocks of memory.
Everything is measured in turn in one run; the figures are medians, and `vs_copy` is the median of the
ratios of neighbours. The plan is what the first merge takes longer than the others, in nanoseconds per
parameter, expert and thread.

Adapters are merged by blocks of their products, in turn with whole products that are formed first; both in
nanoseconds per parameter and thread. Their floor is the time that the multiplications take at the speed at
which square matrices are multiplied in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.merging.inputs import open_inputs
from mergetune.merging.memory_model import MemoryAdapter, MemoryModel
from mergetune.merging.merger import Base, Merger
from mergetune.space.method_table import METHODS, MethodName
from mergetune.space.recipe import MergeRecipe, Source
from mergetune.weights.checkpoint import Checkpoint, Expert, FullExpert
from mergetune.weights.low_rank import LowRank
from mergetune.weights.models import demo_model
from mergetune.weights.writer import write_model

EXPERTS = Path(__file__).parent.parent / "examples" / "taskmaster" / "experts"
VALUES = {  # of what a search space does not hold by default
    **{"lambda": 0.7, "density": 0.3, "t": 0.3},
    **{"select_topk": 0.4, "scale": 1.2, "r": 0.5, "alpha": 0.5},
}
NOT_OF_MERGEKIT = {"nuslerp", "tsv_merge", "iso_c", "svc"}
USUAL = ("task_arithmetic", "ties", "dare_ties")


def recipe(method: MethodName, experts: Sequence[str]) -> MergeRecipe:
    """Return the recipe that is measured."""
    coefficients: dict[str, dict[str, float] | float] = {}
    for parameter in METHODS[method].parameters:
        held = parameter.default
        value = held if isinstance(held, float) else VALUES[parameter.name]
        coefficients[parameter.name] = dict.fromkeys(experts, value) if parameter.is_per_expert else value
    sources = {name: Source(path=name) for name in experts}
    return MergeRecipe.of_one_group(method, Source(path="base"), sources, coefficients)


def smollm2(folder: Path) -> tuple[Base, list[Expert]]:
    """Write the demo's adapters as full models and open them."""
    base = Checkpoint(demo_model())
    experts: list[Expert] = []
    for name, adapter in (("a", "tools"), ("b", "persona")):
        inputs = open_inputs(base.folder, {name: EXPERTS / adapter})
        whole = MergeRecipe.model_validate(
            {
                "method": "task_arithmetic",
                "base": {"path": "base"},
                "experts": {name: {"path": name}},
                "groups": [{"name": "all", "lambda": {name: 1.0}}],
            }
        )
        write_model(folder / name, Merger(inputs.base, inputs.experts).merge(whole), base)
        experts.append(FullExpert(name, Checkpoint(folder / name)))
    return base, experts


def synthetic(n_parameters: float, device: str, n_experts: int) -> tuple[Base, list[Expert]]:
    """Build a Llama-like base of random bfloat16 weights in layers, and fine-tunes of it."""
    width = 4096 if n_parameters >= 4e9 else 2048 if n_parameters >= 5e8 else 1024
    matrices = {"q_proj": 1.0, "k_proj": 0.25, "v_proj": 0.25, "o_proj": 1.0}
    matrices |= {"gate_proj": 3.5, "up_proj": 3.5, "down_proj": 3.5}
    n_layers = max(1, round(n_parameters / (sum(matrices.values()) * width**2)))
    generator = torch.Generator(device).manual_seed(0)

    def noise(shape: tuple[int, int], scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

    names = [f"e{i}" for i in range(n_experts)]
    models: dict[str, dict[str, Tensor]] = {name: {} for name in ("base", *names)}
    for layer in range(n_layers):
        for matrix, ratio in matrices.items():
            name, shape = f"layers.{layer}.{matrix}.weight", (int(width * ratio), width)
            models["base"][name] = noise(shape, 0.02)
            for expert in names:
                models[expert][name] = models["base"][name] + noise(shape, 0.001)
    return MemoryModel("base", models["base"]), [MemoryModel(name, models[name]) for name in names]


class Formed(MemoryAdapter):
    """Hands over products in the place of factors, each formed by one call."""

    def factors(self, name: str) -> None:
        """Return nothing."""

    def task_vector(self, name: str, base: Tensor) -> Tensor:
        """Return the product."""
        return (self.updates[name].b @ self.updates[name].a).to(base.device)


def adapters(base: Base, ranks: Sequence[int], device: str) -> list[MemoryAdapter]:
    """Build adapters of these ranks on all tensors of a base."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(n_rows: int, length: int) -> Tensor:
        return torch.randn(n_rows, length, generator=generator, device=device) * 0.01

    shapes = {name: base.view(name).shape for name in base.names}
    return [
        MemoryAdapter(
            f"e{i}", {name: LowRank(noise(n, rank), noise(rank, m)) for name, (n, m) in shapes.items()}
        )
        for i, rank in enumerate(ranks)
    ]


def seconds(work: Callable[[], object], device: str) -> float:
    """Time one run of `work`."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Return how much memory `work` takes at its peak beyond what is taken before (file pages apart)."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    before, highest, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, _anonymous_bytes())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(0, highest - before)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon.")


def mergekit_seconds(method: MethodName, base: Base, experts: list[Expert]) -> float | None:
    """Time mergekit on the same recipe, tensors in memory and nothing written; it gains from that.

    None where mergekit has no such method, or takes other coefficients.
    """
    from mergekit.merge_methods import merge_state_dicts

    if method in NOT_OF_MERGEKIT:
        return None
    first = experts[0].name
    given = recipe(method, [expert.name for expert in experts]).groups[0].coefficients
    parameters: dict[str, Any] = {
        {"lambda": "weight"}.get(name, name): value[first] if isinstance(value, dict) else value
        for name, value in given.items()
    }
    names, form = base.names, METHODS[method].mergekit
    if form and not form.has_weights:
        parameters.pop("weight", None)
    states: dict[str, dict[str, Tensor | None]] = {
        expert.name: {name: expert.weights(name) for name in names} for expert in experts
    }
    chosen = {"none": None, "first expert": first}.get(form.base_model if form else "base", "base")
    if chosen == "base":
        states["base"] = {name: base.view(name) for name in names}
    work = functools.partial(merge_state_dicts, states, method, parameters=parameters, base=chosen)
    return seconds(work, "cpu")


def measure(
    method: MethodName, base: Base, experts: list[Expert], arguments: argparse.Namespace
) -> dict[str, float | None]:
    """Measure one method: seconds, bytes, ratios to copy and to mergekit, plan, peak memory."""
    device = arguments.device
    out = {name: torch.empty_like(base.view(name)) for name in base.names}
    n_bytes = sum(tensor.nbytes for tensor in out.values())
    n_parameters, n_models = sum(tensor.numel() for tensor in out.values()), len(experts) + 2
    n_moved = n_models * n_bytes + (2 * len(experts) * n_parameters if method.startswith("della") else 0)
    block = torch.zeros(n_moved // 2, dtype=torch.uint8, device=device)
    copy = torch.zeros_like(block)
    wanted = recipe(method, [expert.name for expert in experts])
    mergers = {
        "native": Merger(base, experts),
        "plain": Merger(base, experts, is_plain=True),
    }

    def merge(name: str) -> None:
        for _ in mergers[name].merge(wanted, into=out):
            pass

    work: dict[str, Callable[[], object]] = {
        "copy": functools.partial(copy.copy_, block),
        "native": functools.partial(merge, "native"),
        "plain": functools.partial(merge, "plain"),
    }
    first = {name: seconds(run, device) for name, run in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.repeats):
        for name in ("copy", "native"):
            times[name].append(seconds(work[name], device))
    times["plain"] = [seconds(work["plain"], device)]
    ratio = [own / copied for own, copied in zip(times["native"], times["copy"], strict=True)]
    median = {name: statistics.median(values) for name, values in times.items()}
    peak = peak_bytes(work["native"], device)
    theirs = mergekit_seconds(method, base, experts) if arguments.mergekit else None
    return {
        "bytes_moved": n_moved,
        "seconds": median["native"],
        "copy_seconds": median["copy"],
        "plain_seconds": median["plain"],
        "mergekit_seconds": theirs,
        "vs_copy": 1 / statistics.median(ratio),
        "plain_vs_copy": median["copy"] / median["plain"],
        "vs_mergekit": theirs / median["native"] if theirs is not None else None,
        "plain_vs_mergekit": theirs / median["plain"] if theirs is not None else None,
        "peak_bytes": peak,
        "plan_ns": (first["native"] - median["native"])
        / n_parameters
        / len(experts)
        * torch.get_num_threads()
        * 1e9,
    }


def measure_adapters(
    method: MethodName, base: Base, experts: list[MemoryAdapter], arguments: argparse.Namespace
) -> str:
    """Measure one method on adapters and return a row of `ADAPTERS`."""
    device, size = arguments.device, 1024
    out = {name: torch.empty_like(base.view(name)) for name in base.names}
    n_parameters = sum(tensor.numel() for tensor in out.values())
    wanted = recipe(method, [expert.name for expert in experts])
    whole = [Formed(expert.name, expert.updates) for expert in experts]
    square = torch.randn(size, size, device=device)

    def merge(merger: Merger) -> None:
        for _ in merger.merge(wanted, into=out):
            pass

    work: dict[str, Callable[[], object]] = {
        "blocks": functools.partial(merge, Merger(base, experts)),
        "products": functools.partial(merge, Merger(base, whole)),
        "square": lambda: torch.mm(square, square),
    }
    for run in work.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.repeats):
        for name, run in work.items():
            times[name].append(seconds(run, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["products"], times["blocks"], strict=True))
    in_ns = 1e9 * torch.get_num_threads()
    blocks, products = (median[name] / n_parameters * in_ns for name in ("blocks", "products"))
    floor = median["square"] / size**3 * sum(arguments.adapters) * in_ns
    ranks = " and ".join(map(str, arguments.adapters))
    return f"| `{method}`, {ranks} | {blocks:.2f} | {products:.2f} | {ratio:.1f} | {floor:.2f} |"


ADAPTERS = "| method, ranks | blocks, ns | products first, ns | ratio | floor, ns |\n|---|---|---|---|---|"


def table(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| method, experts | merge | of copy | × mergekit | plain torch | × mergekit | plan, ns | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, row in found.items():
        times = (
            [f"{row['vs_mergekit']:.0f}", f"{row['plain_vs_mergekit']:.1f}"]
            if row["vs_mergekit"]
            else ["–"] * 2
        )
        lines.append(
            f"| `{method}` | {row['seconds']:.3f} s | {row['vs_copy']:.2f} | {times[0]} "
            f"| {row['plain_seconds']:.2f} s | {times[1]} | {row['plan_ns']:.1f} "
            f"| {(row['peak_bytes'] or 0) / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print; `--json` writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parameters", type=float, help="size of a synthetic model; default: SmolLM2")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--methods", nargs="+", choices=["all", *METHODS], default=USUAL)
    parser.add_argument("--experts", nargs="+", type=int, default=[2], help="of a synthetic model")
    parser.add_argument("--adapters", nargs="+", type=int, help="ranks of adapters of a synthetic model")
    parser.add_argument(
        "--mergekit", action=argparse.BooleanOptionalAction, help="default: with SmolLM2 only"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.parameters is None:
        arguments.parameters = 8e9
    if arguments.adapters and arguments.parameters is None:
        parser.error("--adapters needs --parameters: they are of a synthetic model")
    if arguments.mergekit is None:
        arguments.mergekit = arguments.parameters is None
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.parameters is None:
            base, experts = smollm2(Path(folder))
        else:
            n_experts = 0 if arguments.adapters else max(arguments.experts)
            base, experts = synthetic(arguments.parameters, arguments.device, n_experts)
        methods = list(METHODS) if "all" in arguments.methods else arguments.methods
        if arguments.adapters:
            given = adapters(base, arguments.adapters, arguments.device)
            rows = [measure_adapters(method, base, given, arguments) for method in methods]
            print("\n".join([ADAPTERS, *rows]))
            return
        found: dict[str, dict[str, float | None]] = {}
        for method in methods:
            most = METHODS[method].max_experts or len(experts)
            for n in dict.fromkeys(min(count, most) for count in arguments.experts):
                row = measure(method, base, experts[:n], arguments)
                found[f"{method}, {n}"] = row
                print(table({f"{method}, {n}": row}).splitlines()[-1], flush=True)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps({"methods": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
