"""The elementwise part of every merge: one pass over memory, in chunks that stay in cache.

For each parameter the base and the experts are read once in their own dtype and the result is written
once; everything between happens in float32, or float64 where the base is in float64. `merge_chunk` is the
definition, in plain torch; `merged_entries`, all of it but the rounding, can be differentiated. On a CPU
with a C++ compiler `native` does the same with the same bits; on a GPU `torch.compile` makes one kernel
of it, whose fused multiply-adds may differ in a last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mergetune.merging import native

Keep = Literal["all", "trim", "band", "random", "clip"]
Combine = Literal["sum", "count", "weights", "none"]

_CPU_CHUNK, _CUDA_CHUNK = 1 << 17, 1 << 28  # entries; the CPU's fit the second-level cache

Number = float | Tensor  # a tensor of shape (rows, 1) holds one for each row


class Numbers(NamedTuple):
    """What `merge_chunk` reads beside the weights; entry i of a sequence belongs to expert i.

    `low` and `high` bound the magnitudes kept; `limits`, `keys`, `stream` and `start` are int32 for
    `hash32`, with `start` the position of the chunk's first entry in its tensor. All but the int32 are
    rounded to float32 when they are used.
    """

    lambdas: Sequence[Number]
    base_weight: Number = 1.0
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    limits: Sequence[int] = ()
    keys: Sequence[int] = ()
    stream: int = 0
    start: int = 0


@dataclass(frozen=True)
class Step:
    """The merge of one tensor, reduced to numbers and an elementwise rule.

    `keep` says which entries of a task vector τ count: all; those with low ≤ |τ| (trim); those with
    low ≤ |τ| < high (band); a random subset; or all, cut to ±low (clip). `combine` says what becomes
    of the λτ: their sum; or only those whose sign is the elected one, their sum divided by their
    count, by the sum of their λ (weights), or by nothing (none).

    `vectors` takes the place of the experts' task vectors where a rule looked at whole tensors.
    """

    numbers: Numbers
    keep: Keep = "all"
    combine: Combine = "sum"
    vectors: Sequence[Tensor] | None = None


def merge_chunk(
    out: Tensor,
    base: Tensor,
    sources: Sequence[Tensor],
    are_vectors: Sequence[bool],
    keep: Keep,
    combine: Combine,
    numbers: Numbers,
) -> Tensor:
    """Merge entries of one tensor into `out` and return the largest magnitude, NaN if there is one.

    All tensors have one shape. `sources[i]` is a task vector in float32 where `are_vectors[i]`, else
    the expert's weights. Sums are accumulated in float32 in the order of the experts, and cast once;
    adding 0.0 rids them of negative zeros, which would depend on how an entry was dropped.
    """
    merged = merged_entries(base, sources, are_vectors, keep, combine, numbers)
    out.copy_(merged)
    return merged.abs().amax()


def merged_entries(
    base: Tensor,
    sources: Sequence[Tensor],
    are_vectors: Sequence[bool],
    keep: Keep,
    combine: Combine,
    numbers: Numbers,
) -> Tensor:
    """Return the merged entries before they are rounded; see `merge_chunk`.

    Autograd follows numbers that are tensors, with what is kept and which sign is elected held fixed.
    """
    start = wide(base)
    kept = kept_vectors(start, sources, are_vectors, keep, numbers)
    parts = [vector * weight for vector, weight in zip(kept, numbers.lambdas, strict=True)]
    if combine == "sum":
        merged = numbers.base_weight * start
        return merged + (_sum(parts) + 0.0) if parts else merged + 0.0
    return start + (_consensus(parts, combine, numbers.lambdas) + 0.0)


def kept_vectors(
    start: Tensor, sources: Sequence[Tensor], are_vectors: Sequence[bool], keep: Keep, numbers: Numbers
) -> list[Tensor]:
    """Return task vectors without the entries that a rule drops, in the precision of `start`, the base."""
    vectors = (
        source.to(start.dtype) if is_vector else source.to(start.dtype) - start
        for source, is_vector in zip(sources, are_vectors, strict=True)
    )
    return [_kept(vector, i, keep, numbers) for i, vector in enumerate(vectors)]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the precision that merging computes in: float32, or float64 if it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _kept(vector: Tensor, i: int, keep: Keep, numbers: Numbers) -> Tensor:
    """Set the entries to zero that expert i's rule drops."""
    if keep == "all":
        return vector
    if keep == "random":
        index = numbers.start + torch.arange(vector.numel(), dtype=torch.int32, device=vector.device)
        is_kept = hash32(index, numbers.stream, numbers.keys[i]) <= numbers.limits[i]
        return vector * is_kept
    if keep == "clip":
        return vector.clamp(-numbers.low[i], numbers.low[i])
    magnitude = vector.abs()
    is_kept = magnitude >= numbers.low[i]
    if keep == "band":
        is_kept = is_kept & (magnitude < numbers.high[i])
    return vector * is_kept  # torch.where takes four times as long


def _consensus(parts: Sequence[Tensor], combine: Combine, lambdas: Sequence[Number]) -> Tensor:
    """Add up, entry by entry, the parts whose sign is that of Σ λτ (TIES, steps 2 and 3), and divide.

    Yadav et al. 2023, algorithm 1. Zeros never agree; where Σ λτ is exactly zero nothing does.
    """
    elected = _sum(parts)
    agrees = [(part * elected > 0).to(elected.dtype) for part in parts]
    total = _sum([part * agree for agree, part in zip(agrees, parts, strict=True)])
    if combine == "none":
        return total
    if combine == "weights":
        divisor = _sum([agree * lambdas[i] for i, agree in enumerate(agrees)])
        return total / (divisor + (divisor == 0))
    count = _sum(agrees)
    share = (count < 2).to(count.dtype)
    for n in range(2, len(parts) + 1):  # a division would take longer than all the rest
        share = share + (count == n) * (1 / n)
    return total * share


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def hash32(index: Tensor, stream: int, key: int) -> Tensor:
    """Hash int32 counters to uniform int32 values: a random number that is a function of its place.

    Two rounds of multiply and xorshift (constants of `lowbias32`, Wellons 2018), with the tensor's
    `stream` in the first and the expert's `key` in the second, so that all experts share the first.
    The last xorshift is left out: it only stirs the low bits, which seldom decide a comparison.
    """
    value = index * signed(0x9E3779B9) + stream
    value = (value ^ ((value >> 16) & 0xFFFF)) * signed(0x7FEB352D)
    value = value + key
    return (value ^ ((value >> 15) & 0x1FFFF)) * signed(0x846CA68B)


def keep_limit(probability: float) -> int:
    """Return the int32 that a uniform int32 does not exceed with this probability ∈ (0, 1]."""
    return max(round(probability * 2**32), 1) - 2**31 - 1


def signed(value: int) -> int:
    """Map an unsigned 32-bit integer to the int32 of the same bits."""
    return value - (1 << 32) if value >= 1 << 31 else value


def merge_tensor(
    step: Step,
    base: Tensor,
    sources: Sequence[Tensor],
    are_vectors: Sequence[bool],
    out: Tensor,
    is_plain: bool = False,
) -> Tensor | float:
    """Merge one whole tensor into `out`, as `merge_chunk` does a part of it; `is_plain`: in plain torch.

    The largest magnitude is a tensor where reading it would make this process wait for a GPU.
    """
    if step.vectors is not None:
        sources, are_vectors = step.vectors, (True,) * len(step.vectors)
    size, device, numbers = base.numel(), base.device, step.numbers
    rule = (tuple(are_vectors), step.keep, step.combine)
    if isinstance(numbers.base_weight, Tensor):  # a weight for each row: the tensor keeps its shape
        return merge_chunk(out, base, sources, *rule, numbers)
    if not is_plain and native.can_merge((out, base, *sources)):
        return native.merge(out, base, sources, *rule, numbers)
    kernel, chunk = merge_chunk, _CPU_CHUNK
    if device.type == "cuda":
        kernel, chunk = merge_chunk if is_plain else compiled_merge_chunk(), _CUDA_CHUNK
    flat = [tensor.reshape(-1) for tensor in (out, base, *sources)]
    peaks = []
    for begin in range(0, size, chunk):
        part = [tensor[begin : begin + chunk] for tensor in flat]
        peaks.append(kernel(part[0], part[1], part[2:], *rule, numbers._replace(start=signed(begin % 2**32))))
    return peaks[0] if len(peaks) == 1 else torch.stack(peaks).amax()


@functools.cache
def compiled_merge_chunk() -> Callable[..., Tensor]:
    """Return `merge_chunk` as one GPU kernel, compiled at first use; numbers are passed as tensors."""
    compiled: Callable[..., Tensor] = torch.compile(merge_chunk, dynamic=True)

    def call(out: Tensor, *arguments: Any) -> Tensor:
        *others, numbers = arguments
        types = [torch.float32] * 4 + [torch.int32] * 4  # as the fields of Numbers
        moved: list[Any] = [
            torch.tensor(each, dtype=t, device=out.device) for each, t in zip(numbers, types, strict=True)
        ]
        return compiled(out, *others, Numbers(*moved))

    return call
