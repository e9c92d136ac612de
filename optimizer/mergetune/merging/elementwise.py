"""The elementwise part of every merge: one pass over memory, in chunks that stay in cache.

For each parameter the base and the experts are read once in their own dtype and the result is written
once; everything between happens in float32, or float64 where the base is in float64. Of adapters the
factors are read, and some rows of their product at a time are formed in cache. `merge_chunk` is the
definition, in plain torch; `merged_entries`, all of it but the rounding, can be differentiated. On a CPU
with a C++ compiler `native` does the same with the same bits; on a GPU `torch.compile` makes one kernel
of it, whose fused multiply-adds may differ in a last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergetune.merging import native
from mergetune.weights.low_rank import LowRank

Keep = Literal["all", "trim", "band", "random", "clip", "ranked", "rescaled", "selected"]
Combine = Literal["sum", "count", "weights", "none", "shares", "overlap"]

CPU_CHUNK, _CUDA_CHUNK = 1 << 17, 1 << 28  # entries; the CPU's fit the second-level cache
LANES, SPAN = 8, 1 << 16  # as in `job.h`

Number = float | Tensor  # a tensor of shape (n_rows, 1) holds one for each row


class Source(NamedTuple):
    """What an expert makes of a tensor: its weights in their own dtype, or its task vector in float32."""

    data: Tensor
    kind: Literal["weights", "vector"]

    def to(self, device: torch.device) -> Source:
        """Return the same on a device."""
        return self._replace(data=self.data.to(device))


AnySource = Source | LowRank  # factors stand for the task vector that is their product


def formed(sources: Iterable[AnySource]) -> list[Source]:
    """Return sources with their products formed, whole."""
    return [
        Source(source.product(), "vector") if isinstance(source, LowRank) else source for source in sources
    ]


class Numbers(NamedTuple):
    """What `merge_chunk` reads beside the weights; entry i of a sequence belongs to expert i.

    `low` and `high` bound the magnitudes kept, `scales` being what magnitudes are multiplied by first.
    `low` and `steps` make probabilities of ranks, and `factors` multiply what is kept by rank, or what one
    expert alone changes. `limits`, `keys`, `stream` and `start` are int32 for `hash32`, with `start` the
    position of the chunk's first entry in its tensor; `lines` are, of a part that has gaps there, the
    entries of a line and from the begin of one to that of the next. All but the int32 are rounded to float32
    when they are used. Either no number is by rows, or `lambdas`, `base_weight` and, if they are given,
    `scales` are.
    """

    lambdas: Sequence[Number]
    base_weight: Number = 1.0
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    steps: Sequence[float] = ()
    factors: Sequence[Number] = ()
    scales: Tensor | None = None
    limits: Sequence[int] = ()
    keys: Sequence[int] = ()
    stream: int = 0
    start: int = 0
    lines: tuple[int, int] | None = None

    @property
    def n_rows(self) -> int | None:
        """How many rows have numbers of their own; None: the numbers are for the whole tensor."""
        weight = self.base_weight
        return len(weight) if isinstance(weight, Tensor) and weight.ndim else None

    def from_entry(self, begin: int) -> Numbers:
        """Return the numbers of the entries from `begin` on, which begins a line."""
        width, stride = self.lines or (1, 1)
        return self._replace(start=signed((self.start + begin // width * stride) % 2**32))

    def of_rows(self, rows: slice) -> Numbers:
        """Return the numbers of some rows, where rows have their own."""
        assert isinstance(self.base_weight, Tensor)
        lambdas = [weight[rows] for weight in self.lambdas if isinstance(weight, Tensor)]
        scales = None if self.scales is None else self.scales[rows]
        return self._replace(lambdas=lambdas, base_weight=self.base_weight[rows], scales=scales)


@dataclass(frozen=True)
class Step:
    """The merge of one tensor, reduced to numbers and an elementwise rule.

    `keep` says which entries of a task vector τ count: all; those with low ≤ |τ| (trim); those with
    low ≤ |τ| < high (band); a random subset; all, cut to ±low (clip); a random subset of probability
    p = low + step · rank, times a factor (ranked) or divided by p (rescaled); or those whose variance
    across the experts is at least the first low (selected). `combine` says what becomes of the λτ: their
    sum; or only those whose sign is the elected one, their sum divided by their count, by the sum of
    their λ (weights), or by nothing (none); or as with weights, but with a sign that the τ elect (shares); or
    the mean of the λτ that are kept, and where that is a single one its τ times a factor (overlap).

    `ranks` are of the entries' magnitudes in their row, for each expert: uint16 or uint32. `sources`
    takes the place of the operands' where a rule asks experts that leave the tensor as it is, too.
    """

    numbers: Numbers
    keep: Keep = "all"
    combine: Combine = "sum"
    ranks: Sequence[Tensor] = ()
    sources: Sequence[AnySource] | None = None

    def of_rows(self, rows: slice, row_length: int) -> Step:
        """Return the step for some rows of the tensor."""
        by_rows = self.numbers.n_rows is not None
        numbers = self.numbers.of_rows(rows) if by_rows else self.numbers.from_entry(rows.start * row_length)
        return replace(self, numbers=numbers, ranks=[each[rows] for each in self.ranks])

    def to(self, device: torch.device) -> Step:
        """Return the step with ranks and the numbers of rows on a device."""
        numbers = self.numbers
        if isinstance(numbers.base_weight, Tensor) and numbers.n_rows is not None:
            lambdas = [each.to(device) for each in numbers.lambdas if isinstance(each, Tensor)]
            scales = None if numbers.scales is None else numbers.scales.to(device)
            base_weight = numbers.base_weight.to(device)
            numbers = numbers._replace(lambdas=lambdas, base_weight=base_weight, scales=scales)
        return replace(self, numbers=numbers, ranks=[each.to(device) for each in self.ranks])

    def of_experts(self, places: Sequence[int]) -> Step:
        """Return the step for some of the experts, for rules that look at each by itself."""
        numbers = self.numbers
        kept: dict[str, Any] = {
            name: [values[place] for place in places]
            for name in ("lambdas", "low", "high", "steps", "factors", "limits", "keys")
            if (values := getattr(numbers, name))
        }
        ranks = [self.ranks[place] for place in places] if self.ranks else ()
        return replace(self, numbers=numbers._replace(**kept), ranks=ranks)

    def of_part(self, base: Tensor, sources: Sequence[AnySource], rows: slice, columns: slice) -> Step:
        """Return the merge of a part of the tensor alone, with its own sources, their products formed.

        Args:
            base: the base's tensor.
            sources: of the whole tensor; they are read instead of the step's own.
            rows: of the tensor, whose rows are its last dimension.
            columns: the entries of each row.
        """
        length = row_length(base)
        width = columns.stop - columns.start
        numbers = self.numbers if self.numbers.n_rows is None else self.numbers.of_rows(rows)
        return replace(
            self,
            numbers=numbers._replace(
                start=signed((rows.start * length + columns.start) % 2**32),
                lines=None if width == length else (width, length),
            ),
            ranks=[part_of(each, rows, columns) for each in self.ranks],
            sources=[_source_of_part(each, rows, columns) for each in sources],
        )


def row_length(tensor: Tensor) -> int:
    """Return the entries of a row, the last dimension; 1 for a scalar."""
    return tensor.shape[-1] if tensor.ndim else 1


def part_of(tensor: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return a part of a tensor: (n_rows, n_columns), a view unless the tensor lies in pieces."""
    return tensor.reshape(-1, row_length(tensor))[rows, columns]


def _source_of_part(source: AnySource, rows: slice, columns: slice) -> Source:
    if isinstance(source, LowRank):
        return Source(source.of_rows(rows)[:, columns], "vector")
    return source._replace(data=part_of(source.data, rows, columns))


def merge_chunk(
    out: Tensor,
    base: Tensor,
    sources: Sequence[Tensor],
    are_vectors: Sequence[bool],
    keep: Keep,
    combine: Combine,
    numbers: Numbers,
    ranks: Sequence[Tensor] = (),
) -> Tensor:
    """Merge entries of one tensor into `out` and return the largest magnitude, NaN if there is one.

    All tensors have one shape. `sources[i]` is a task vector in float32 where `are_vectors[i]`, else
    the expert's weights. Sums are accumulated in float32 in the order of the experts, and cast once;
    adding 0.0 rids them of negative zeros, which would depend on how an entry was dropped.
    """
    merged = merged_entries(base, sources, are_vectors, keep, combine, numbers, ranks)
    out.copy_(merged)
    return merged.abs().amax()


def merged_entries(
    base: Tensor,
    sources: Sequence[Tensor],
    are_vectors: Sequence[bool],
    keep: Keep,
    combine: Combine,
    numbers: Numbers,
    ranks: Sequence[Tensor] = (),
) -> Tensor:
    """Return the merged entries before they are rounded; see `merge_chunk`.

    Autograd follows numbers that are tensors, with what is kept and which sign is elected held fixed.
    """
    start = wide(base)
    kept = kept_vectors(start, sources, are_vectors, keep, numbers, ranks)
    if combine == "shares":
        return start + (_shared(kept, numbers.lambdas) + 0.0)
    if combine == "overlap":
        return start + (_overlapping(kept, numbers.lambdas, numbers.factors) + 0.0)
    parts = [vector * weight for vector, weight in zip(kept, numbers.lambdas, strict=True)]
    if combine == "sum":
        merged = numbers.base_weight * start
        return merged + (_sum(parts) + 0.0) if parts else merged + 0.0
    return start + (_consensus(parts, combine, numbers.lambdas) + 0.0)


def kept_vectors(
    start: Tensor,
    sources: Sequence[Tensor],
    are_vectors: Sequence[bool],
    keep: Keep,
    numbers: Numbers,
    ranks: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Return task vectors without the entries that a rule drops, in the precision of `start`, the base."""
    vectors = [
        source.to(start.dtype) if is_vector else source.to(start.dtype) - start
        for source, is_vector in zip(sources, are_vectors, strict=True)
    ]
    if keep == "selected":
        is_selected = variance(vectors) >= numbers.low[0]
        return [vector.where(is_selected, 0.0) for vector in vectors]
    return [_kept(vector, i, keep, numbers, ranks) for i, vector in enumerate(vectors)]


def variance(vectors: Sequence[Tensor]) -> Tensor:
    """Return the variance of each entry across vectors, in their dtype; exactly 0 where they agree.

    Computed in float64, so that entries whose values are the same in another order have the same.
    """
    first, share = vectors[0].double(), 1 / len(vectors)
    shifted = [vector.double() - first for vector in vectors]
    total, squares = _sum(shifted), _sum([each * each for each in shifted])
    return ((squares - total * total * share) * share).to(vectors[0].dtype)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the precision that merging computes in: float32, or float64 if it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _kept(vector: Tensor, i: int, keep: Keep, numbers: Numbers, ranks: Sequence[Tensor]) -> Tensor:
    """Set the entries to zero that expert i's rule drops."""
    if keep == "all":
        return vector
    if keep == "clip":
        return vector.clamp(-numbers.low[i], numbers.low[i])
    if keep in ("random", "ranked", "rescaled"):
        index = torch.arange(vector.numel(), dtype=torch.int32, device=vector.device)
        if numbers.lines is not None:
            width, stride = numbers.lines
            index = index // width * stride + index % width
        drawn = hash32(numbers.start + index, numbers.stream, numbers.keys[i])
        if keep == "random":
            return vector * (drawn <= numbers.limits[i])
        probability = keep_probabilities(ranks[i], numbers.low[i], numbers.steps[i])
        limit = (probability.where(probability < 1, 0.0) * 2**31).to(torch.int32)
        is_kept = (((drawn ^ -(2**31)) >> 1) & 0x7FFFFFFF) < limit  # of unsigned halves
        scaled = vector * numbers.factors[i] if keep == "ranked" else vector / probability
        return scaled.where(is_kept | (probability == 1), 0.0)
    magnitude = vector.abs() if numbers.scales is None else vector.abs() * numbers.scales
    is_kept = magnitude >= numbers.low[i]
    if keep == "band":
        is_kept = is_kept & (magnitude < numbers.high[i])
    return vector * is_kept  # torch.where takes four times as long


def keep_probabilities(ranks: Tensor, low: float, step: float) -> Tensor:
    """Return low + step · rank ∈ [0, 1], in float32."""
    return (low + step * ranks.float()).clamp(max=1)


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
    return total * (1 / _sum(agrees).clamp(min=1))


def _shared(vectors: Sequence[Tensor], shares: Sequence[Number]) -> Tensor:
    """Average, entry by entry, the vectors with the sign of their sum, + where it is 0, by their shares.

    SCE's last two steps (Wan et al. 2024); 0 where nothing agrees.
    """
    elects_plus = _sum(vectors) >= 0
    agrees = [torch.where(elects_plus, vector > 0, vector < 0) for vector in vectors]
    pairs = list(zip(vectors, agrees, shares, strict=True))
    total = _sum([(vector * share).where(agree, 0.0) for vector, agree, share in pairs])
    divisor = _sum([agree.to(total.dtype) * share for _, agree, share in pairs])
    return total / (divisor + (divisor == 0))


def _overlapping(vectors: Sequence[Tensor], lambdas: Sequence[Number], factors: Sequence[Number]) -> Tensor:
    """Average, entry by entry, the weighted vectors that are not zero; one alone has a factor instead.

    RAM's last step (Yuan et al. 2026).
    """
    count = _sum([(vector != 0).to(vector.dtype) for vector in vectors])
    shared = _sum([vector * weight for vector, weight in zip(vectors, lambdas, strict=True)])
    alone = _sum([vector * factor for vector, factor in zip(vectors, factors, strict=True)])
    return torch.where(count > 1, shared / count.clamp(min=1), alone)


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
    step: Step, base: Tensor, sources: Sequence[AnySource], out: Tensor, is_plain: bool = False
) -> Tensor | float:
    """Merge a tensor, or a slice of one, into `out`, as `merge_chunk` does; `is_plain`: in plain torch.

    A slice comes with a step of its own, see `Step.of_part`. Products of factors are formed in blocks of
    rows. An expert whose lambda is 0 is not read where it changes no bits. The largest magnitude, which is
    returned, is a tensor where reading it would make this process wait for a GPU.
    """
    step, sources = without_zeros(step, sources if step.sources is None else step.sources)
    peaks = [
        _merge_block(part, base_part, vectors, out_part, is_plain)
        for part, (out_part, base_part), vectors in row_blocks(step, (out, base), sources)
    ]
    return _largest(peaks)


def row_blocks(
    step: Step, tensors: Sequence[Tensor], sources: Sequence[AnySource]
) -> Iterator[tuple[Step, Sequence[Tensor], Sequence[Source]]]:
    """Yield a merge in blocks of rows, with the products of factors formed, or whole where there are none.

    A block's products stand in the place of those of the block before.
    """
    factors = [source for source in sources if isinstance(source, LowRank)]
    if not factors:
        yield step, tensors, formed(sources)
        return
    begin, row_length = 0, tensors[0].shape[1]
    for blocks in zip(*(each.blocks() for each in factors), strict=True):
        here = slice(begin, begin + len(blocks[0]))
        products = iter(blocks)
        vectors = [
            Source(next(products), "vector")
            if isinstance(source, LowRank)
            else source._replace(data=source.data[here])
            for source in sources
        ]
        yield step.of_rows(here, row_length), [tensor[here] for tensor in tensors], vectors
        begin = here.stop


def without_zeros(step: Step, sources: Sequence[AnySource]) -> tuple[Step, Sequence[AnySource]]:
    """Leave out the experts whose lambda is 0, unless a rule reads their task vectors unweighted.

    A sum that one of them is added to has the same bits, and their entries never agree with an elected sign.
    """
    places = [i for i, weight in enumerate(step.numbers.lambdas) if isinstance(weight, Tensor) or weight != 0]
    if step.combine in ("shares", "overlap") or len(places) == len(sources):
        return step, sources
    combine = step.combine if places else "sum"
    return replace(step.of_experts(places), combine=combine), [sources[place] for place in places]


def _largest(peaks: Sequence[Tensor | float]) -> Tensor | float:
    """Return the largest magnitude, NaN if there is one."""
    return peaks[0] if len(peaks) == 1 else torch.stack([torch.as_tensor(peak) for peak in peaks]).amax()


def _merge_block(
    step: Step, base: Tensor, sources: Sequence[Source], out: Tensor, is_plain: bool
) -> Tensor | float:
    """Merge what `row_blocks` yields into `out`; returns the largest magnitude."""
    data = [source.data for source in sources]
    are_vectors = [source.kind == "vector" for source in sources]
    if not is_plain and native.can_merge((out, base, *data), step.numbers.lines):
        return native.merge(out, base, data, are_vectors, step)
    kernel, chunk = merge_chunk, CPU_CHUNK
    if base.device.type == "cuda":
        is_compiled = not is_plain and step.numbers.n_rows is None
        kernel, chunk = compiled_merge_chunk() if is_compiled else merge_chunk, _CUDA_CHUNK
    peaks = []
    for (out_part, base_part, *parts), ranks, numbers in spans(step, (out, base, *data), chunk):
        peaks.append(kernel(out_part, base_part, parts, are_vectors, step.keep, step.combine, numbers, ranks))
    return _largest(peaks)


def spans(
    step: Step, tensors: Sequence[Tensor], chunk: int
) -> Iterator[tuple[list[Tensor], list[Tensor], Numbers]]:
    """Yield about `chunk` entries of each tensor at a time, with their ranks and their numbers.

    The tensors have one shape. What is yielded of them is flat, or, where rows have numbers of their own,
    of shape (n_rows, n_columns).
    """
    n_rows, n_tensors = step.numbers.n_rows, len(tensors)
    n_columns = tensors[0].numel() // (n_rows or 1)
    shape = (-1,) if n_rows is None else (n_rows, n_columns)
    flat = [tensor.reshape(shape) for tensor in (*tensors, *step.ranks)]
    line = step.numbers.lines[0] if step.numbers.lines else 1
    length = max(line, chunk // line * line) if n_rows is None else max(1, chunk // n_columns)
    for begin in range(0, len(flat[0]), length):
        here = slice(begin, begin + length)
        numbers = step.numbers.from_entry(begin) if n_rows is None else step.numbers.of_rows(here)
        parts = [tensor[here] for tensor in flat]
        yield parts[:n_tensors], parts[n_tensors:], numbers


def magnitude_sums(
    step: Step, base: Tensor, sources: Sequence[AnySource], is_plain: bool = False
) -> list[tuple[float, float]]:
    """Return each expert's Σ|τ|, of the whole tensor and of what the rule keeps of it.

    In float64 and in one order everywhere: `LANES` sums side by side over `SPAN` entries, added up, then
    the spans one after the other, and then the blocks of rows that products are formed in.
    """
    totals = np.zeros((len(sources), 2))
    for part, (base_part,), vectors in row_blocks(step, (base,), sources):
        totals += _magnitude_sums(part, base_part, vectors, is_plain)
    return [(float(before), float(after)) for before, after in totals]


def _magnitude_sums(
    step: Step, base: Tensor, sources: Sequence[Source], is_plain: bool
) -> list[tuple[float, float]]:
    data = [source.data for source in sources]
    are_vectors = [source.kind == "vector" for source in sources]
    if not is_plain and native.can_merge((base, base, *data)):
        return native.magnitude_sums(base, data, are_vectors, step)
    totals = np.zeros((len(data), 2))
    for (base_part, *parts), ranks, numbers in spans(step, (base, *data), SPAN):
        start = wide(base_part)
        whole = kept_vectors(start, parts, are_vectors, "all", numbers)
        kept = kept_vectors(start, parts, are_vectors, step.keep, numbers, ranks)
        for i, pair in enumerate(zip(whole, kept, strict=True)):
            totals[i] += [lane_sum(vector.abs().double().cpu().numpy()) for vector in pair]
    return [(float(before), float(after)) for before, after in totals]


def lane_sum(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Return the sum of up to `SPAN` values, in `LANES` sums side by side."""
    lanes = np.zeros((-(-len(values) // LANES), LANES))
    lanes.reshape(-1)[: len(values)] = values
    return float(np.add.accumulate(np.add.accumulate(lanes)[-1])[-1])


@functools.cache
def compiled_merge_chunk() -> Callable[..., Tensor]:
    """Return `merge_chunk` as one GPU kernel, compiled at first use; numbers are passed as tensors."""
    compiled: Callable[..., Tensor] = torch.compile(merge_chunk, dynamic=True)

    def call(out: Tensor, *arguments: Any) -> Tensor:
        base, sources, are_vectors, keep, combine, numbers, *ranks = arguments
        integers = ("limits", "keys", "stream", "start", "lines")
        moved: dict[str, Any] = {
            name: torch.tensor(
                each, dtype=torch.int32 if name in integers else torch.float32, device=out.device
            )
            for name, each in numbers._asdict().items()
            if each is not None
        }
        return compiled(out, base, sources, are_vectors, keep, combine, Numbers(**moved), *ranks)

    return call
