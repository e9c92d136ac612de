"""The C++ of this room, compiled once per machine: merges and plans at the speed of memory, on the CPU."""

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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mergetune.files.atomic_files import replacing
from mergetune.files.library import in_cache

if TYPE_CHECKING:
    from mergetune.merging.elementwise import Step


_FOLDER = Path(__file__).parent
_SOURCES = ("kernel.cpp", "plan.cpp")
_HEADER = "job.h"
_FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC"),
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
# As in the enumerations of `job.h`.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VECTOR = 3
_KEEP = {
    name: i
    for i, name in enumerate(("all", "trim", "band", "random", "clip", "ranked", "rescaled", "selected"))
}
_COMBINE = {name: i for i, name in enumerate(("sum", "count", "weights", "none", "shares", "overlap"))}
_FLOATS, _INTEGERS = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int32)
_POINTERS = ctypes.POINTER(ctypes.c_void_p)


class Job(ctypes.Structure):
    """`Job` of `job.h`."""

    _fields_ = (
        *(("base", ctypes.c_void_p), ("out", ctypes.c_void_p)),
        *(("sources", _POINTERS), ("kinds", _INTEGERS), ("ranks", _POINTERS)),
        *(
            (name, _FLOATS)
            for name in ("lambdas", "base_weights", "scales", "low", "high", "steps", "factors")
        ),
        *((name, _INTEGERS) for name in ("limits", "keys")),
        *((name, ctypes.c_int64) for name in ("size", "row_length", "n_rows", "width", "stride")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("dtype", "n_experts", "rank_bytes", "keep", "combine", "stream", "start", "n_threads"),
            )
        ),
    )


def can_merge(tensors: Sequence[Tensor], lines: tuple[int, int] | None = None) -> bool:
    """Say whether the kernel is there and takes these tensors: the result, the base and the sources.

    `lines`: of all but the result, as in `elementwise.Numbers`.
    """
    out, *read = tensors
    return (
        out.dtype == read[0].dtype
        and all(each.dtype in _DTYPES and each.is_cpu for each in tensors)
        and out.is_contiguous()
        and all(each.stride() == (lines[1], 1) if lines else each.is_contiguous() for each in read)
        and library() is not None
    )


def merge(
    out: Tensor, base: Tensor, sources: Sequence[Tensor], are_vectors: Sequence[bool], step: Step
) -> float:
    """Merge a tensor into `out`; what `elementwise.merge_tensor` does, with the same result."""
    job = job_of(base, sources, are_vectors)
    _add_numbers(job, step)
    job.out = out.data_ptr()
    peak: float = loaded().merge_tensor(ctypes.byref(job))
    return peak


def magnitude_sums(
    base: Tensor, sources: Sequence[Tensor], are_vectors: Sequence[bool], step: Step
) -> list[tuple[float, float]]:
    """Return what `elementwise.magnitude_sums` does, with the same result."""
    job = job_of(base, sources, are_vectors)
    _add_numbers(job, step)
    job.lambdas = _floats([1.0] * len(sources))
    sums = []
    for i in range(len(sources)):
        before, after = ctypes.c_double(), ctypes.c_double()
        loaded().sum_magnitudes(ctypes.byref(job), i, ctypes.byref(before), ctypes.byref(after))
        sums.append((before.value, after.value))
    return sums


def job_of(base: Tensor, sources: Sequence[Tensor], are_vectors: Sequence[bool]) -> Job:
    """Return a job without numbers, on one row of all entries; tensors must outlive it."""
    kinds = [
        _VECTOR if is_vector else _DTYPES[source.dtype]
        for source, is_vector in zip(sources, are_vectors, strict=True)
    ]
    return Job(
        base=base.data_ptr(),
        sources=_pointers(sources),
        kinds=_integers(kinds),
        size=base.numel(),
        row_length=base.numel(),
        n_rows=1,
        width=base.numel(),
        stride=base.numel(),
        dtype=_DTYPES[base.dtype],
        n_experts=len(sources),
        n_threads=torch.get_num_threads(),
    )


def _add_numbers(job: Job, step: Step) -> None:
    numbers = step.numbers
    if numbers.n_rows is None:
        job.lambdas, job.base_weights = _floats(numbers.lambdas), _floats([numbers.base_weight])
    else:
        job.n_rows, job.row_length = numbers.n_rows, job.size // numbers.n_rows
        job.lambdas, job.base_weights = by_rows(numbers.lambdas), by_rows([numbers.base_weight])
        job.scales = None if numbers.scales is None else by_rows([numbers.scales])
    for name in ("low", "high", "steps", "factors"):
        setattr(job, name, _floats(getattr(numbers, name)))
    for name in ("limits", "keys"):
        setattr(job, name, _integers(getattr(numbers, name)))
    if step.ranks:
        job.ranks, job.rank_bytes = _pointers(step.ranks), step.ranks[0].element_size()
    job.stream, job.start = numbers.stream, numbers.start
    if numbers.lines is not None:
        job.width, job.stride = numbers.lines
    job.keep, job.combine = _KEEP[step.keep], _COMBINE[step.combine]


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _floats(values: Sequence[Any]) -> ctypes.Array[ctypes.c_float] | None:
    return (ctypes.c_float * len(values))(*values) if values else None


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32] | None:
    return (ctypes.c_int32 * len(values))(*values) if values else None


def by_rows(columns: Sequence[Any]) -> ctypes.Array[ctypes.c_float]:
    """Return numbers by rows, each of shape (n_rows, 1), as one array (n_columns, n_rows)."""
    table = np.stack([column.float().numpy().reshape(-1) for column in columns] or [np.empty(0, np.float32)])
    return (ctypes.c_float * table.size).from_buffer(np.ascontiguousarray(table).data)


def why_slow() -> str | None:
    """Return why there is no kernel and merging runs in plain torch, None where there is one."""
    found = _loaded()
    if isinstance(found, ctypes.CDLL):
        return None
    return f"Merging runs in plain torch, 10 to 40 times slower: {found} Install g++ 9 or newer, or clang."


def library() -> ctypes.CDLL | None:
    """Return the compiled code, None where there is none."""
    found = _loaded()
    return found if isinstance(found, ctypes.CDLL) else None


def loaded() -> ctypes.CDLL:
    """Return the compiled code, which must be there."""
    found = library()
    assert found is not None
    return found


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
    library.count_varying.restype = ctypes.c_int64
    return library


def _build(compiler: str) -> Path:
    """Compile the kernel unless that was done on this machine before; returns the shared library."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = (
        *((_FOLDER / name).read_text(encoding="utf-8") for name in (*_SOURCES, _HEADER)),
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
            sources = [str(_FOLDER / name) for name in _SOURCES]
            _compile([compiler, *_FLAGS, *sources, "-o", str(built)], _TUNING)
            with replacing(path) as temporary:
                built.replace(temporary)
    return path


def _compile(command: list[str], tunings: Iterable[Sequence[str]]) -> None:
    """Run a compiler with the first set of further options that it takes."""
    for tuning in tunings:
        done = subprocess.run([*command, *tuning], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    sources = " and ".join(_SOURCES)
    raise subprocess.SubprocessError(f"{command[0]} cannot compile {sources}: {done.stderr.strip()}")


def _processor() -> str:
    """Return what tells processors apart: a library for one may not run on another."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))]
    return features[0] if features else platform.processor()
