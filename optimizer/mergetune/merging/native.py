"""`kernel.cpp`, compiled once per machine: the elementwise pass at the speed of memory, on the CPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergetune.files.atomic_files import replacing
from mergetune.files.library import in_cache

if TYPE_CHECKING:
    from mergetune.merging.elementwise import Numbers


_SOURCE = Path(__file__).with_name("kernel.cpp")
_MAX_EXPERTS = 8  # the kernel is compiled for each number up to it; more are merged in plain torch
_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", f"-DMAX_EXPERTS={_MAX_EXPERTS}"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# What not every compiler and processor takes, from the best down.
_TUNING = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-march=native",),
    (),
)
# As in the enumerations of `kernel.cpp`.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KEEP = {"all": 0, "trim": 1, "band": 2, "random": 3, "clip": 4}
_COMBINE = {"sum": 0, "count": 1, "weights": 2, "none": 3}


class _Job(ctypes.Structure):
    """`Job` of `kernel.cpp`."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("sources", ctypes.c_void_p * _MAX_EXPERTS),
        *((name, ctypes.c_int32 * _MAX_EXPERTS) for name in ("dtypes", "are_vectors")),
        *((name, ctypes.c_float * _MAX_EXPERTS) for name in ("lambdas", "low", "high")),
        *((name, ctypes.c_int32 * _MAX_EXPERTS) for name in ("limits", "keys")),
        ("size", ctypes.c_int64),
        ("base_weight", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in ("stream", "dtype", "n_experts", "keep", "combine", "n_threads")
        ),
    )


def can_merge(tensors: Sequence[Tensor]) -> bool:
    """Say whether the kernel is there and takes these tensors: the result, the base and the sources."""
    return (
        len(tensors) <= _MAX_EXPERTS + 2
        and tensors[0].dtype == tensors[1].dtype
        and all(each.dtype in _DTYPES and each.is_cpu and each.is_contiguous() for each in tensors)
        and _library() is not None
    )


def merge(
    out: Tensor,
    base: Tensor,
    sources: Sequence[Tensor],
    are_vectors: Sequence[bool],
    keep: str,
    combine: str,
    numbers: Numbers,
) -> float:
    """Merge a whole tensor into `out`; what `elementwise.merge_chunk` does, with the same result."""
    library = _library()
    assert library is not None  # can_merge
    job = _Job(
        base.data_ptr(),
        out.data_ptr(),
        tuple([source.data_ptr() for source in sources]),
        tuple([_DTYPES[source.dtype] for source in sources]),
        tuple(are_vectors),
        *map(tuple, (numbers.lambdas, numbers.low, numbers.high, numbers.limits, numbers.keys)),
        base.numel(),
        numbers.base_weight,
        numbers.stream,
        _DTYPES[base.dtype],
        len(sources),
        _KEEP[keep],
        _COMBINE[combine],
        torch.get_num_threads(),
    )
    peak: float = library.merge_tensor(ctypes.byref(job))
    return peak


def why_slow() -> str | None:
    """Return why there is no kernel and merging runs in plain torch, None where there is one."""
    found = _loaded()
    if isinstance(found, ctypes.CDLL):
        return None
    return f"Merging runs in plain torch, 10 to 40 times slower: {found} Install g++ 9 or newer, or clang."


def _library() -> ctypes.CDLL | None:
    found = _loaded()
    return found if isinstance(found, ctypes.CDLL) else None


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """Return the compiled kernel, or why there is none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        return "there is no C++ compiler."
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"{error}."
    library.merge_tensor.restype = ctypes.c_float
    return library


def _build(compiler: str) -> Path:
    """Compile the kernel unless that was done on this machine before; returns the shared library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (
        _SOURCE.read_text(encoding="utf-8"),
        version,
        platform.machine(),
        _processor(),
        repr((_FLAGS, _TUNING)),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = in_cache(f"kernel-{digest}.so")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            _compile([compiler, *_FLAGS, str(_SOURCE), "-o", str(built)], _TUNING)
            with replacing(path) as temporary:
                built.replace(temporary)
    return path


def _compile(command: list[str], tunings: Iterable[Sequence[str]]) -> None:
    """Run a compiler with the first set of further options that it takes."""
    for tuning in tunings:
        done = subprocess.run([*command, *tuning], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise subprocess.SubprocessError(f"{command[0]} cannot compile {_SOURCE.name}: {done.stderr.strip()}")


def _processor() -> str:
    """Return what tells processors apart: a library for one may not run on another."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return features[0] if features else platform.processor()
