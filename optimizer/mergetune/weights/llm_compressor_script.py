"""Quantize a model directory by llm-compressor, in an environment that need not have mergetune.

Run by its path: SCRIPT, to see whether llm-compressor works, or SCRIPT MODEL OUT SCHEME GROUP_SIZE. It prints
JSON. No data is needed: weights are rounded to the nearest, and the scales of activations are found as they
come. The head stays as it is.
"""

import importlib.metadata
import json
import sys
from typing import Any

import llmcompressor
import transformers
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor.modifiers.quantization import QuantizationModifier


def main(model: str, out: str, preset: str, group_size: int) -> int:
    """Write the quantized model to `out`; returns how many layers were quantized.

    `group_size` is how many weights of a row share a scale, where those of `preset` do in groups.
    """
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    head = network.get_output_embeddings()
    ignored = [name for name, module in network.named_modules() if module is head]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = group_size
    recipe = QuantizationModifier(config_groups={"all": scheme}, ignore=ignored)
    llmcompressor.oneshot(model=network, recipe=recipe)
    n_layers = sum(hasattr(module, "quantization_scheme") for module in network.modules())
    network.save_pretrained(out, save_compressed=True)
    return n_layers


if __name__ == "__main__":
    found: dict[str, str | int] = {"version": importlib.metadata.version("llmcompressor")}
    if arguments := sys.argv[1:]:
        source, target, name, size = arguments
        found["n_layers"] = main(source, target, name, int(size))
    print(json.dumps(found))
