"""What a machine computes with is told in words."""

from __future__ import annotations

import platform

import pytest
import torch

from mergetune.machine.hardware import hardware


def test_the_processor_its_cores_and_every_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    processor, cores, *gpus = hardware().rsplit(", ", 3)
    assert (cores, gpus) == ("12 cores", ["GPU 0", "GPU 1"])
    assert processor
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert processor != "x86_64"
