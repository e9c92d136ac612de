"""How long a large merge takes to the disk, and how much memory: by `mergetune merge`, and by mergekit.

    python benchmarks/to_disk.py FOLDER                # 3.9 billion parameters: 48 GB on disk
    python benchmarks/to_disk.py FOLDER --layers 1 --methods ties --mergekit

A random Llama of the widths of Llama 3.1 8B and fine-tunes of it are written to FOLDER once, in bfloat16;
with all 32 layers and the demo's tokenizer it has 7.2 billion parameters. Each merge is a command of its
own. The first one of a method makes its plan (`plans/` in the cache), which the next one reads. `memory`
is the peak of what the process takes beyond the files that it maps, and `resident` with those: pages of
files that the system may take back at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from merge import recipe
from mergetune.space.method_table import METHODS
from mergetune.weights.models import demo_model

WIDTH, INNER, HEADS, KEY_HEADS = 4096, 14336, 32, 8
FOREIGN = "mergekit.yaml"  # what stands beside a merge that mergekit can express


def write_models(folder: Path, n_layers: int, n_experts: int) -> list[str]:
    """Write the base and its fine-tunes, a file for each layer; returns the fine-tunes' names."""
    names = [f"e{i}" for i in range(n_experts)]
    if (folder / "ready").exists():
        return names
    generator = torch.Generator().manual_seed(0)
    tokenizer = demo_model()
    config = LlamaConfig(
        vocab_size=json.loads((tokenizer / "config.json").read_text())["vocab_size"],
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        num_hidden_layers=n_layers,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    for name in ("base", *names):
        config.save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, folder / name)

    def noise(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * scale

    rows = {"self_attn.q_proj": WIDTH, "self_attn.k_proj": WIDTH // 4, "self_attn.v_proj": WIDTH // 4}
    rows |= {"self_attn.o_proj": WIDTH, "mlp.gate_proj": INNER, "mlp.up_proj": INNER, "mlp.down_proj": WIDTH}
    places: dict[str, str] = {}
    for layer in range(-1, n_layers):
        shapes: dict[str, tuple[int, ...]] = {}
        if layer < 0:
            shapes = {"model.embed_tokens.weight": (config.vocab_size, WIDTH), "model.norm.weight": (WIDTH,)}
        else:
            at = f"model.layers.{layer}."
            for part, n_rows in rows.items():
                shapes[f"{at}{part}.weight"] = (n_rows, INNER if part == "mlp.down_proj" else WIDTH)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{at}{norm}.weight"] = (WIDTH,)
        base = {name: noise(shape, 0.02) for name, shape in shapes.items()}
        file = f"layer-{layer + 1}.safetensors"
        places |= dict.fromkeys(shapes, file)
        save_file(base, folder / "base" / file, {"format": "pt"})
        for expert in names:
            own = {name: tensor + noise(tuple(tensor.shape), 0.001) for name, tensor in base.items()}
            save_file(own, folder / expert / file, {"format": "pt"})
    size = sum(each.stat().st_size for each in (folder / "base").glob("*.safetensors"))
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    for name in ("base", *names):
        (folder / name / "model.safetensors.index.json").write_text(index)
    (folder / "ready").touch()
    return names


def watched(command: Sequence[str]) -> dict[str, float]:
    """Run a command; returns its seconds and, in bytes, its peaks of memory."""
    start, peaks = time.perf_counter(), {"RssAnon": 0, "VmRSS": 0}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.perf_counter() - start, "memory": peaks["RssAnon"], "resident": peaks["VmRSS"]}


def main() -> None:
    """Write the models, merge and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the models are written; they stay")
    parser.add_argument("--layers", type=int, default=17)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["ties", "della"])
    parser.add_argument(
        "--mergekit", action="store_true", help="measure mergekit, too, where it can merge the same"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    names = write_models(folder, arguments.layers, arguments.experts)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # plans are made here, and measured
    print("| merge | seconds | memory, GiB | resident, GiB |\n|---|---|---|---|")

    def measure(what: str, *command: str) -> None:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        row = watched([*command, str(folder / "merged")])
        memory, resident = (row[name] / 2**30 for name in ("memory", "resident"))
        print(f"| {what} | {row['seconds']:.0f} | {memory:.2f} | {resident:.1f} |", flush=True)

    for method in arguments.methods:
        file = folder / f"{method}.yaml"
        recipe(method, names).write(file)
        for what in ("first", "again"):
            measure(f"`{method}`, {what}", sys.executable, "-m", "mergetune.cli", "merge", str(file))
        if arguments.mergekit and (folder / "merged" / FOREIGN).exists():
            theirs = shutil.move(folder / "merged" / FOREIGN, folder / f"{method}-{FOREIGN}")
            measure(f"`{method}`, mergekit", str(Path(sys.executable).parent / "mergekit-yaml"), str(theirs))


if __name__ == "__main__":
    main()
