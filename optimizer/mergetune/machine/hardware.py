"""What this machine computes with: times taken here say nothing of another machine."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def hardware() -> str:
    """Return what a model's speed depends on: the processor, how many cores torch uses, and the GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([_processor(), f"{torch.get_num_threads()} cores", *gpus])


def _processor() -> str:
    """Return the processor's model; where the system does not tell it, its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
