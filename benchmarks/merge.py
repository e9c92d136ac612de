"""How fast candidates are merged: against a plain copy of the same bytes, and against mergekit.

    python benchmarks/merge.py                          # SmolLM2-135M and the demo's two experts, made full
    python benchmarks/merge.py --parameters 1e9         # a synthetic Llama of that size, in memory
    python benchmarks/merge.py --device cuda            # 8B synthetic parameters on the card

A merge of two experts reads three models and writes one. The floor is the time in which `copy_` moves
the same bytes, read and written together, between two blocks of memory. Everything is measured in turn
in one run; the figures are medians, and `vs_copy` is the median of the ratios of neighbours. The table
of thresholds that TIES needs once a study is made before, and timed apart.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergetune.merging.inputs import open_inputs
from mergetune.merging.memory_model import MemoryModel
from mergetune.merging.merger import Base, Merger
from mergetune.space.recipe import MergeRecipe
from mergetune.weights.checkpoint import Checkpoint, Expert, FullExpert
from mergetune.weights.models import demo_model
from mergetune.weights.writer import write_model

EXPERTS = Path(__file__).parent.parent / "examples" / "taskmaster" / "experts"
METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"lambda": {"a": 0.7, "b": 0.5}},
    "ties": {"lambda": {"a": 0.7, "b": 0.5}, "density": {"a": 0.3, "b": 0.6}},
    "dare_ties": {"lambda": {"a": 0.7, "b": 0.5}, "density": {"a": 0.3, "b": 0.6}},
}


def recipe(method: str) -> MergeRecipe:
    """Return the recipe that is measured."""
    group = METHODS[method]
    return MergeRecipe.model_validate(
        {
            "method": method,
            "base": {"path": "base"},
            "experts": {"a": {"path": "a"}, "b": {"path": "b"}},
            "groups": [{"name": "all", **group}],
        }
    )


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


def synthetic(n_parameters: float, device: str) -> tuple[Base, list[Expert]]:
    """Build a Llama-like base of random bfloat16 weights in layers, and two fine-tunes of it."""
    width = 4096 if n_parameters >= 4e9 else 2048
    matrices = {"q_proj": 1.0, "k_proj": 0.25, "v_proj": 0.25, "o_proj": 1.0}
    matrices |= {"gate_proj": 3.5, "up_proj": 3.5, "down_proj": 3.5}
    n_layers = max(1, round(n_parameters / (sum(matrices.values()) * width**2)))
    generator = torch.Generator(device).manual_seed(0)

    def noise(shape: tuple[int, int], scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

    models: dict[str, dict[str, Tensor]] = {"base": {}, "a": {}, "b": {}}
    for layer in range(n_layers):
        for matrix, ratio in matrices.items():
            name, shape = f"layers.{layer}.{matrix}.weight", (int(width * ratio), width)
            models["base"][name] = noise(shape, 0.02)
            for expert in ("a", "b"):
                models[expert][name] = models["base"][name] + noise(shape, 0.001)
    return MemoryModel("base", models["base"]), [MemoryModel(name, models[name]) for name in ("a", "b")]


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


def mergekit_seconds(method: str, base: Base, experts: list[Expert]) -> float:
    """Time mergekit on the same recipe, tensors in memory and nothing written; it gains from that."""
    from mergekit.merge_methods import merge_state_dicts

    group = METHODS[method]
    parameters: dict[str, Any] = {"weight": list(group["lambda"].values())}
    if "density" in group:
        parameters["density"] = list(group["density"].values())
    names = base.names
    states: dict[str, dict[str, Tensor | None]] = {"base": {name: base.view(name) for name in names}}
    states |= {expert.name: {name: expert.weights(name) for name in names} for expert in experts}
    work = functools.partial(merge_state_dicts, states, method, parameters=parameters, base="base")
    return seconds(work, "cpu")


def measure(
    method: str, base: Base, experts: list[Expert], arguments: argparse.Namespace
) -> dict[str, float | None]:
    """Measure one method: seconds, bytes, ratios to copy and to mergekit, peak memory."""
    device = arguments.device
    out = {name: torch.empty_like(base.view(name)) for name in base.names}
    n_bytes = sum(tensor.nbytes for tensor in out.values())
    block = torch.zeros(2 * n_bytes, dtype=torch.uint8, device=device)  # with the copy: 4 models' bytes
    copy = torch.zeros_like(block)
    wanted = recipe(method)
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
    times["plain"] = [seconds(work["plain"], device) for _ in range(3)]
    ratio = [own / copied for own, copied in zip(times["native"], times["copy"], strict=True)]
    median = {name: statistics.median(values) for name, values in times.items()}
    peak = peak_bytes(work["native"], device)
    theirs = mergekit_seconds(method, base, experts) if arguments.mergekit else None
    return {
        "bytes_moved": 4 * n_bytes,
        "seconds": median["native"],
        "copy_seconds": median["copy"],
        "plain_seconds": median["plain"],
        "mergekit_seconds": theirs,
        "vs_copy": 1 / statistics.median(ratio),
        "plain_vs_copy": median["copy"] / median["plain"],
        "vs_mergekit": theirs / median["native"] if theirs is not None else None,
        "plain_vs_mergekit": theirs / median["plain"] if theirs is not None else None,
        "peak_bytes": peak,
        "first_seconds": first["native"],  # with the kernel's compilation, if that was not done before
    }


def table(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| method | merge | of copy speed | × mergekit | plain torch | of copy speed | × mergekit | memory |",
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
            f"| {row['plain_seconds']:.2f} s | {row['plain_vs_copy']:.2f} | {times[1]} "
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
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--mergekit", action=argparse.BooleanOptionalAction, help="default: with SmolLM2 only"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and arguments.parameters is None:
        arguments.parameters = 8e9
    if arguments.mergekit is None:
        arguments.mergekit = arguments.parameters is None
    os.environ.setdefault("TQDM_DISABLE", "1")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.parameters is None:
            base, experts = smollm2(Path(folder))
        else:
            base, experts = synthetic(arguments.parameters, arguments.device)
        found = {method: measure(method, base, experts, arguments) for method in arguments.methods}
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps({"methods": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
