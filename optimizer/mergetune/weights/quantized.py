"""A model directory with fewer bits to a weight, made by llm-compressor in an environment of its own.

llm-compressor and vLLM ask for different versions of transformers and compressed-tensors, so that one
environment seldom holds both. What it writes is in the format of compressed-tensors, which vLLM serves and
transformers reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from mergetune.errors import MergetuneError
from mergetune.weights.tensor_files import open_weights

if TYPE_CHECKING:  # a study file is read without torch
    from mergetune.weights.checkpoint import Checkpoint

Bits = Literal["fp8", "int8", "int4"]

# llm-compressor's schemes. `fp8` and `int8`: weights with a scale for each row, activations with one for each
# token. `int4`: weights alone, with a scale for each group.
_PRESETS: Mapping[Bits, str] = MappingProxyType({"fp8": "FP8_DYNAMIC", "int8": "W8A8", "int4": "W4A16"})
_GROUPS = (128, 64, 32)  # sizes that vLLM's kernels take
_SCRIPT = Path(__file__).with_name("llm_compressor_script.py")
_INSTALL = (
    "Make an environment of its own, `python3 -m venv quantizing && quantizing/bin/pip install "
    "llmcompressor`, and name its Python: `deploy: {quantize: …, python: quantizing/bin/python}`"
)


@dataclass(frozen=True)
class Quantized:
    """What was made of a model: how many layers have fewer bits, and the bytes of all weights."""

    n_layers: int
    nbytes: int
    nbytes_before: int
    made_by: str

    @property
    def summary(self) -> tuple[str, ...]:
        """Say it in sentences."""
        share = self.nbytes / self.nbytes_before
        return (
            f"{self.made_by} quantized {self.n_layers} linear layers; embeddings and head stay as they are.",
            f"The weights take {_size(self.nbytes)}, {share:.0%} of {_size(self.nbytes_before)}.",
        )


def check_quantizer(bits: Bits, python: str | None, base: Checkpoint) -> None:
    """Raise `MergetuneError` if a merge of this base cannot be quantized, or not be measured after that.

    `python` is the interpreter that has llm-compressor; None: this one.
    """
    _group_size(bits, base)
    if find_spec("compressed_tensors") is None:
        raise MergetuneError(
            "A quantized model is measured with the package compressed-tensors, which is not installed. Run: "
            "pip install compressed-tensors"
        )
    _run(python)


def quantize(model: Path, folder: Path, bits: Bits, python: str | None = None) -> Quantized:
    """Write a quantized model directory, whole or not at all, with the tokenizer and templates of `model`.

    Args:
        model: the directory of a model that writes text, in full precision.
        folder: where to.
        bits: how the weights are stored.
        python: see `check_quantizer`.

    Raises:
        MergetuneError: the model cannot be quantized so, or llm-compressor fails; the message says why.
    """
    from mergetune.weights.checkpoint import Checkpoint
    from mergetune.weights.writer import replacing_folder, write_companions

    before = Checkpoint(model)
    with replacing_folder(folder, before.nbytes) as temporary:
        write_companions(temporary, before, {}, {})
        found = _run(python, str(model), str(temporary), _PRESETS[bits], str(_group_size(bits, before)))
        if not found["n_layers"]:
            raise MergetuneError(f"{model}: llm-compressor finds no linear layers to quantize in this model.")
        for file in temporary.glob("*.safetensors"):
            file.chmod(0o644)  # others may serve it
        files = open_weights(temporary)
        nbytes = sum(files.view(name).nbytes for name in files.names)
    made_by = f"llm-compressor {found['version']} ({_PRESETS[bits]}, rounded to the nearest)"
    return Quantized(found["n_layers"], nbytes, before.nbytes, made_by)


def _group_size(bits: Bits, model: Checkpoint) -> int:
    """Return how many weights of a row share a scale: the most that fits every layer.

    Raises:
        MergetuneError: the model is none that is quantized here.
    """
    from mergetune.weights.architecture import read_config
    from mergetune.weights.checkpoint import is_head

    config, architecture = read_config(model.folder), model.architecture
    if architecture is None or config is not config.get_text_config():
        raise MergetuneError(
            f"{model.folder}: only models of text alone are quantized here, but this is a "
            f"`{config.model_type}`. Leave `deploy` out of the study file."
        )
    layers = [name for name in model.names if not is_head(name)]
    widths = {
        name: model.shape(name)[1]
        for name in layers
        if (layer := architecture.layer(name)) is not None and layer.kind == "linear"
    }
    if not widths:
        raise MergetuneError(
            f"{model.folder}: only linear layers are quantized, but a `{config.model_type}` has none. Leave "
            "`deploy` out of the study file."
        )
    for size in _GROUPS:
        if all(width % size == 0 for width in widths.values()):
            return size
    if bits == "int4":
        name, width = next((name, width) for name, width in widths.items() if width % _GROUPS[-1])
        raise MergetuneError(
            f"{model.folder}: for int4, the columns of every linear layer must be a multiple of "
            f"{_GROUPS[-1]}, but `{name}` has {width}. Take `quantize: int8`."
        )
    return 0


def _run(python: str | None, *arguments: str) -> dict[str, Any]:
    """Run the script in an environment that has llm-compressor; returns what it printed."""
    interpreter = python or sys.executable
    command = [interpreter, str(_SCRIPT), *arguments]
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}  # what lies beside the script is no module of its own
    try:
        done = subprocess.run(command, env=safe, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MergetuneError(
            f"`deploy.python` must be the Python of an environment with llm-compressor, but {interpreter} "
            f"cannot be run ({error.strerror}). {_INSTALL}."
        ) from error
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if arguments:
        raise MergetuneError(f"{arguments[0]}: llm-compressor cannot quantize it ({reason}).")
    raise MergetuneError(
        f"`deploy` needs llm-compressor, which {interpreter} cannot import ({reason}). {_INSTALL}."
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
