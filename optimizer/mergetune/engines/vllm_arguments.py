"""vLLM's own arguments: from the study's options, and as the command line takes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergetune.engines.engine import EngineConfig
from mergetune.weights.models import is_stack

# For vLLM's processes: no reports of usage, no warnings of tokenizers about forks, and no length but ours.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
SECONDS_TO_START = 3600.0  # of silence: a large model is read, and compiled
STACK_FORMAT = "mergetune_stack"  # vLLM's name for how a stack is read
_CPU_CACHE_GIB = 4


def environment_of(device: str) -> dict[str, str]:
    """Return the variables of vLLM's processes; they see the one GPU that `device` names (`cuda:1`)."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return ENVIRONMENT
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": names[int(index)] if names else index}


def engine_arguments(config: EngineConfig, model: Path, dtype: str, max_length: int) -> dict[str, Any]:
    """Return vLLM's `EngineArgs` for a configuration; `config.arguments` come last.

    What the model's generation_config.json says of sampling is left out. `enforce_eager` is null where
    `for_device` is to decide.
    """
    optional = {
        "load_format": STACK_FORMAT if is_stack(model) else None,
        "max_num_seqs": config.batch_size,
        "kv_cache_memory_bytes": config.kv_cache_gib and int(config.kv_cache_gib * 2**30),
    }
    return {
        "model": str(model),
        "dtype": dtype,
        "max_model_len": max_length,
        "generation_config": "vllm",
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "seed": config.seed,
        "worker_extension_cls": "mergetune.engines.vllm_worker.MergeWorker",
        **{name: value for name, value in optional.items() if value is not None},
        **config.arguments,
    }


def for_device(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Settle what depends on the device, in the process that vLLM runs in.

    On a CPU the model is not compiled unless that was asked for, the cache gets 4 GiB instead of most
    of the memory, and no process or core is set apart for the scheduler.
    """
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    settled = {**arguments}
    if settled["enforce_eager"] is None:
        settled["enforce_eager"] = is_cpu
    if is_cpu:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        settled.setdefault("kv_cache_memory_bytes", _CPU_CACHE_GIB * 2**30)
    return settled
