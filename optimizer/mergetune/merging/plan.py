"""What follows from the inputs alone, computed once: in memory, and on disk by the inputs' digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from mergetune.files.atomic_files import replacing
from mergetune.files.library import in_cache
from mergetune.merging.elementwise import AnySource, formed
from mergetune.merging.operands import Operands
from mergetune.merging.tables import Array, Kind

_VERSION = 2  # of the files and of how their tables are made
_ALIGNMENT = 64  # bytes, of every table in a file
_SECONDS_KEPT = 30 * 24 * 3600.0  # without use
_MAX_CHECKED_BYTES = 1 << 26  # of larger tables, which are read as they are used, the size alone is checked

Read = Callable[[str, Sequence[str]], tuple[Tensor, list[AnySource]]]
Tables = Mapping[str, Array]  # by tensor
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # dtypes and shapes


class Plan:
    """The tables of a merge's inputs.

    Args:
        digest_of: returns the SHA-256 of the base and some experts, or None where it is not known: then
            tables are kept in memory only.
        keeps_large: whether tables as large as weights are kept; or else, unless they are on disk already,
            they are made when they are read.
    """

    def __init__(self, digest_of: Callable[[Sequence[str]], str | None], keeps_large: bool = True) -> None:
        self._digest_of, self._keeps_large = digest_of, keeps_large
        self._tables: dict[tuple[str, tuple[str, ...]], dict[str, Array]] = {}

    def prepare(self, kind: Kind, experts: Sequence[str], names: Sequence[str], read: Read) -> None:
        """Have the tables of one kind for some tensors: from memory, from disk, or computed on all threads.

        Args:
            kind: of the tables.
            experts: whose tables they are together.
            names: the tensors.
            read: returns the base's tensor of a name, and these experts' sources.
        """
        known = self._tables.setdefault((kind.name, tuple(experts)), {})
        bases = {name: read(name, ())[0] for name in names if name not in known}
        if not bases:
            return
        layout = {name: kind.layout(base, len(experts)) for name, base in bases.items()}
        digest = self._digest_of(experts)
        if not self._keeps_large and not (digest and _File.of(digest, kind.name, layout).path.exists()):
            layout = {name: entry for name, entry in layout.items() if not _is_large(entry, bases[name])}
        if not layout:
            return

        def fill(tables: Tables) -> None:
            def one(name: str) -> None:
                base, sources = read(name, experts)
                kind.fill(tables[name], base, formed(sources))

            largest_first = sorted(layout, key=lambda name: -bases[name].numel())
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:
                list(threads.map(one, largest_first))

        if digest is None:
            known.update(_in_memory(layout, fill))
        else:
            known.update(_kept(_File.of(digest, kind.name, layout), fill) or _in_memory(layout, fill))

    def table(self, kind: Kind, operands: Operands, expert: str | None = None) -> Array:
        """Return a tensor's table, read only: of an expert that changes it, or of all experts together."""
        experts = operands.experts if expert is None else (expert,)
        known = self._tables.setdefault((kind.name, experts), {})
        found = known.get(operands.name)
        if found is None:
            sources = operands.all_sources if expert is None else [operands.sources[expert]]
            dtype, shape = kind.layout(operands.base, len(sources))
            found = np.zeros(shape, dtype)
            kind.fill(found, operands.base, formed(sources))
            if self._keeps_large or not _is_large((dtype, shape), operands.base):
                known[operands.name] = found
        return found


def _is_large(entry: tuple[str, tuple[int, ...]], base: Tensor) -> bool:
    """Say whether a table of this dtype and shape has as many numbers as the base's tensor."""
    return math.prod(entry[1]) >= base.numel()


@dataclass(frozen=True)
class _File:
    """Tables in a file: a line of JSON that says where each is, its checksum, and the tables."""

    path: Path
    header: bytes
    places: dict[str, tuple[str, tuple[int, ...], int]]  # dtype, shape and offset of each table
    n_bytes: int

    @classmethod
    def of(cls, digest: str, kind: str, layout: Layout) -> _File:
        """Return the file of these inputs, kind and tensors."""
        text = json.dumps([_VERSION, digest, kind, layout])
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        header = text.encode() + b"\n"
        end = _aligned(len(header) + 8)
        places = {}
        for tensor, (dtype, shape) in layout.items():
            places[tensor] = (dtype, shape, end)
            end = _aligned(end + np.dtype(dtype).itemsize * int(np.prod(shape)))
        return cls(in_cache(f"plans/{kind}-{name}"), header, places, end)

    def open(self) -> Tables | None:
        """Return the tables, read only, or None where the file is not there or is damaged."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != self.n_bytes:
                    return None
                mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
        except OSError:
            return None
        with contextlib.suppress(OSError):  # of another user
            os.utime(self.path)  # it is in use
        start = len(self.header)
        is_whole = mapped[:start].tobytes() == self.header
        is_whole = is_whole and mapped[start : start + 8].tobytes() == self._checksum(mapped)
        return self._tables(mapped) if is_whole else None

    def write(self, fill: Callable[[Tables], None]) -> None:
        """Write the file; it is there only when it is whole."""
        with replacing(self.path) as temporary:
            with temporary.open("w+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.n_bytes)  # else a full disk shows as a dead process
                mapped = np.frombuffer(mmap.mmap(file.fileno(), self.n_bytes), np.uint8)
            fill(self._tables(mapped))
            start = len(self.header)
            mapped[:start] = np.frombuffer(self.header, np.uint8)
            mapped[start : start + 8] = np.frombuffer(self._checksum(mapped), np.uint8)

    def _tables(self, mapped: Array) -> dict[str, Array]:
        return {
            name: np.frombuffer(mapped, dtype, int(np.prod(shape)), offset).reshape(shape)
            for name, (dtype, shape, offset) in self.places.items()
        }

    def _checksum(self, mapped: Array) -> bytes:
        if self.n_bytes > _MAX_CHECKED_BYTES:
            return b"unknown."
        return b"%08x" % zlib.crc32(mapped[len(self.header) + 8 :].data)


def _kept(file: _File, fill: Callable[[Tables], None]) -> Tables | None:
    """Return a file's tables, or None where it cannot be written.

    Processes that want the same make it once, and a damaged one is set aside. Where one is made, those that
    nobody has used for a month are removed.
    """
    if (found := file.open()) is not None:
        return found
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file.path}.lock"):
            if (found := file.open()) is None:
                if file.path.exists():
                    file.path.replace(file.path.with_name(f"{file.path.name}.damaged"))
                _remove_unused(file.path.parent)
                file.write(fill)
                found = file.open()
    except OSError:  # a cache that cannot be written, or is full
        return None
    return found


def _remove_unused(folder: Path) -> None:
    now = time.time()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may be faster
            if now - path.stat().st_mtime > _SECONDS_KEPT:
                path.unlink()


def _in_memory(layout: Layout, fill: Callable[[Tables], None]) -> Tables:
    tables: dict[str, Array] = {name: np.zeros(shape, dtype) for name, (dtype, shape) in layout.items()}
    fill(tables)
    return tables


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
